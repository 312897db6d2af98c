/* Programs for 3FS as they are written in C: `ring CHECK MOUNT DIRECTORY`. Exits with 0 if the check holds, and says what
 * does not otherwise. */
#include <errno.h>
#include <fcntl.h>
#include <hf3fs_usrbio.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define MIB (1 << 20)

#define EXPECT(condition)                                                           \
  do {                                                                              \
    if (!(condition)) {                                                             \
      fprintf(stderr, "%s:%d: %s (errno %d)\n", __func__, __LINE__, #condition, errno); \
      exit(1);                                                                      \
    }                                                                               \
  } while (0)

static const char *mount;
static char path[1024];

static int open_file(const char *directory, const char *name, int flags) {
  snprintf(path, sizeof(path), "%s/%s", directory, name);
  int fd = open(path, flags, 0644);
  EXPECT(fd >= 0);
  return fd;
}

static uint8_t pattern(size_t offset) { return (uint8_t)(offset * 31 + offset / 4096 * 7); }

static void fill(uint8_t *memory, size_t bytes, size_t offset) {
  for (size_t i = 0; i < bytes; i++) memory[i] = pattern(offset + i);
}

static int equal(const uint8_t *memory, size_t bytes, size_t offset) {
  for (size_t i = 0; i < bytes; i++)
    if (memory[i] != pattern(offset + i)) return 0;
  return 1;
}

static struct timespec in_seconds(int seconds) {
  struct timespec at;
  clock_gettime(CLOCK_REALTIME, &at);
  at.tv_sec += seconds;
  return at;
}

/* One I/O from beginning to end. */
static int64_t one(struct hf3fs_ior *ior, struct hf3fs_iov *iov, void *ptr, int fd, size_t off, uint64_t len) {
  struct hf3fs_cqe cqe;
  int index = hf3fs_prep_io(ior, iov, ior->for_read, ptr, fd, off, len, &path);
  if (index < 0) return index;
  EXPECT(hf3fs_submit_ios(ior) == 0);
  struct timespec limit = in_seconds(30);
  EXPECT(hf3fs_wait_for_ios(ior, &cqe, 1, 1, &limit) == 1);
  EXPECT(cqe.index == index && cqe.userdata == &path);
  return cqe.result;
}

/* Write a file through one ring and read it through another, in batches, results in the order of preparation. */
static void check_batches(const char *directory) {
  enum { IOS = 64, BYTES = 96 * 1024 };
  struct hf3fs_iov iov;
  struct hf3fs_ior writes, reads;
  struct hf3fs_cqe cqes[IOS];
  EXPECT(hf3fs_iovcreate(&iov, mount, (size_t)IOS * BYTES, 0, -1) == 0);
  EXPECT(iov.size == (size_t)IOS * BYTES && iov.block_size == 0 && strcmp(iov.mount_point, mount) == 0);
  EXPECT(hf3fs_iorcreate(&writes, mount, IOS, false, 0, -1) == 0);
  EXPECT(hf3fs_iorcreate4(&reads, mount, IOS, true, 8, 0, -1, HF3FS_IOR_ALLOW_READ_UNCOMMITTED) == 0);
  EXPECT(hf3fs_io_entries(&writes) == IOS && reads.for_read && reads.io_depth == 8 && reads.flags == 1);
  int fd = open_file(directory, "batches", O_RDWR | O_CREAT);
  int registered = hf3fs_reg_fd(fd, 0);
  EXPECT(registered <= 0);
  for (int round = 0; round < 2; round++) {
    struct hf3fs_ior *ior = round ? &reads : &writes;
    if (round)
      memset(iov.base, 0, iov.size);
    else
      fill(iov.base, iov.size, 0);
    for (int i = 0; i < IOS; i++) {
      size_t at = (size_t)i * BYTES;
      /* The number that was registered serves as well as what the registration returned. */
      EXPECT(hf3fs_prep_io(ior, &iov, ior->for_read, iov.base + at, i % 2 ? fd : registered, at, BYTES, iov.base + at) == i);
    }
    EXPECT(hf3fs_prep_io(ior, &iov, ior->for_read, iov.base, fd, 0, BYTES, NULL) == -EAGAIN);
    EXPECT(hf3fs_submit_ios(ior) == 0);
    for (int got = 0; got < IOS;) {
      int more = hf3fs_wait_for_ios(ior, cqes, IOS, 1, NULL);
      EXPECT(more > 0);
      for (int i = 0; i < more; i++, got++) {
        EXPECT(cqes[i].index == got && cqes[i].result == BYTES);
        EXPECT(cqes[i].userdata == iov.base + (size_t)got * BYTES);
      }
    }
    EXPECT(equal(iov.base, iov.size, 0));
  }
  /* Other descriptors of the mount see it, and its length, at once. */
  struct stat found;
  EXPECT(stat(path, &found) == 0 && found.st_size == (off_t)IOS * BYTES);
  hf3fs_dereg_fd(fd);
  EXPECT(hf3fs_prep_io(&reads, &iov, true, iov.base, fd, 0, 1, NULL) == -EBADF);
  hf3fs_iordestroy(&reads);
  hf3fs_iordestroy(&writes);
  hf3fs_iovdestroy(&iov);
  EXPECT(iov.iovh == NULL && reads.iorh == NULL);
  close(fd);
}

/* What is asked wrongly is refused, and what is refused has no effect. */
static void check_errors(const char *directory) {
  struct hf3fs_iov iov;
  struct hf3fs_ior ior, writes;
  struct hf3fs_cqe cqe;
  char name[256];
  EXPECT(hf3fs_iovcreate(&iov, "/tmp", MIB, 0, -1) == -ENOENT);
  EXPECT(hf3fs_iovcreate(&iov, "", MIB, 0, -1) == -EINVAL && hf3fs_iovcreate(NULL, mount, MIB, 0, -1) == -EINVAL);
  EXPECT(hf3fs_iorcreate(&ior, mount, 0, true, 0, -1) == -EINVAL);
  EXPECT(hf3fs_iorcreate3(&ior, mount, 4, true, 0, 0, -1, -1) == -EINVAL);
  EXPECT(hf3fs_iorcreate4(&ior, mount, 4, true, 0, 0, -1, 1 << 20) == -EINVAL);
  EXPECT(hf3fs_ior_size(0) == 0 && hf3fs_ior_size(4) > 0);
  EXPECT(hf3fs_iovcreate(&iov, mount, MIB, 4096, -1) == 0);
  EXPECT(hf3fs_iorcreate2(&ior, mount, 4, true, 0, -1, -1) == 0);
  EXPECT(hf3fs_iorcreate2(&writes, mount, 4, false, 0, 1, -1) == 0);
  int fd = open_file(directory, "errors", O_RDWR | O_CREAT);
  EXPECT(pwrite(fd, "abcdef", 6, 0) == 6);
  int reader = open_file(directory, "errors", O_RDONLY), writer = open_file(directory, "errors", O_WRONLY);
  int elsewhere = open("/tmp", O_RDONLY);
  EXPECT(hf3fs_reg_fd(elsewhere, 0) == EBADF && hf3fs_reg_fd(-1, 0) == EBADF && hf3fs_reg_fd(9999, 0) == EBADF);
  EXPECT(hf3fs_prep_io(&ior, &iov, true, iov.base, fd, 0, 1, NULL) == -EBADF);
  EXPECT(hf3fs_reg_fd(fd, 0) < 0 && hf3fs_reg_fd(reader, 0) < 0 && hf3fs_reg_fd(writer, 0) < 0);
  EXPECT(hf3fs_reg_fd(fd, 0) == EINVAL);
  EXPECT(hf3fs_prep_io(&ior, &iov, true, iov.base, writer, 0, 1, NULL) == -EACCES);
  EXPECT(hf3fs_prep_io(&writes, &iov, false, iov.base, reader, 0, 1, NULL) == -EACCES);
  EXPECT(hf3fs_prep_io(&ior, &iov, false, iov.base, fd, 0, 1, NULL) == -EINVAL);
  EXPECT(hf3fs_prep_io(&ior, &iov, true, iov.base, fd, 0, 0, NULL) == -EINVAL);
  EXPECT(hf3fs_prep_io(&ior, &iov, true, iov.base - 1, fd, 0, 1, NULL) == -EINVAL);
  EXPECT(hf3fs_prep_io(&ior, &iov, true, iov.base + MIB, fd, 0, 1, NULL) == -EINVAL);
  EXPECT(hf3fs_prep_io(&ior, &iov, true, iov.base + 4000, fd, 0, 200, NULL) == -EINVAL);
  EXPECT(hf3fs_prep_io(NULL, &iov, true, iov.base, fd, 0, 1, NULL) == -EINVAL);
  EXPECT(hf3fs_submit_ios(NULL) == -EINVAL && hf3fs_wait_for_ios(&ior, &cqe, 0, 0, NULL) == -EINVAL);
  /* Past the end there is nothing; a part of the last bytes is what there is. */
  EXPECT(one(&ior, &iov, iov.base, fd, 100, 10) == 0 && one(&ior, &iov, iov.base, fd, 4, 10) == 2);
  EXPECT(memcmp(iov.base, "ef", 2) == 0);
  /* A time that is over: what is ready is given, else nothing. Some clients pass a monotonic clock, which is. */
  struct timespec past;
  clock_gettime(CLOCK_MONOTONIC, &past);
  EXPECT(hf3fs_wait_for_ios(&ior, &cqe, 1, 1, &past) == 0);
  EXPECT(hf3fs_prep_io(&ior, &iov, true, iov.base, fd, 0, 6, NULL) >= 0 && hf3fs_submit_ios(&ior) == 0);
  int got = 0;
  for (struct timespec limit = in_seconds(30), now; got == 0;) {
    got = hf3fs_wait_for_ios(&ior, &cqe, 1, 1, &past);
    clock_gettime(CLOCK_REALTIME, &now);
    EXPECT(now.tv_sec < limit.tv_sec);
  }
  EXPECT(got == 1 && cqe.result == 6);
  /* A descriptor that is closed still serves; its number cannot be registered again before it is withdrawn. */
  close(fd);
  EXPECT(one(&ior, &iov, iov.base, fd, 0, 6) == 6);
  EXPECT(open_file(directory, "errors", O_RDONLY) == fd && hf3fs_reg_fd(fd, 0) == EINVAL);
  hf3fs_dereg_fd(fd);
  EXPECT(hf3fs_reg_fd(fd, 0) < 0);
  /* The mount's name. */
  EXPECT(hf3fs_is_hf3fs(fd) && !hf3fs_is_hf3fs(elsewhere) && !hf3fs_is_hf3fs(-1));
  EXPECT(hf3fs_extract_mount_point(name, sizeof(name), path) == (int)strlen(mount) + 1 && strcmp(name, mount) == 0);
  EXPECT(hf3fs_extract_mount_point(name, sizeof(name), mount) == (int)strlen(mount) + 1);
  EXPECT(hf3fs_extract_mount_point(name, 1, mount) == (int)strlen(mount) + 1);
  EXPECT(hf3fs_extract_mount_point(name, sizeof(name), "/tmp") == -1);
  hf3fs_iordestroy(&ior);
  hf3fs_iordestroy(&writes);
  hf3fs_iovdestroy(&iov);
}

/* Memory of another kind: opened by its id, wrapped, and holes. */
static void check_memory(const char *directory) {
  struct hf3fs_iov iov, same, wrapped;
  struct hf3fs_ior ior, strict;
  size_t start = 0, end = MIB;
  char other[1100];
  EXPECT(hf3fs_iovcreate(&iov, mount, 2 * MIB, 0, 0) == 0 || hf3fs_iovcreate(&iov, mount, 2 * MIB, 0, -1) == 0);
  EXPECT(hf3fs_iovopen(&same, (const uint8_t *)iov.id, mount, 2 * MIB, 0, -1) == 0);
  EXPECT(hf3fs_iovopen(&wrapped, (const uint8_t *)iov.id, mount, 4 * MIB, 0, -1) == -EINVAL);
  EXPECT(hf3fs_iovwrap(&wrapped, iov.base, (const uint8_t *)iov.id, mount, iov.size, 0, -1) == 0);
  hf3fs_iovunlink(&iov);
  EXPECT(hf3fs_iorcreate3(&ior, mount, 4, true, -2, 0, 5, -1) == 0);
  EXPECT(hf3fs_iorcreate4(&strict, mount, 4, true, 0, 0, -1, HF3FS_IOR_FORBID_READ_HOLES) == 0);
  int fd = open_file(directory, "memory", O_RDWR | O_CREAT);
  static uint8_t data[2 * MIB];
  fill(data, sizeof(data), 0);
  EXPECT(pwrite(fd, data, sizeof(data), 0) == sizeof(data));
  EXPECT(hf3fs_reg_fd(fd, 0) < 0);
  EXPECT(one(&ior, &wrapped, iov.base, fd, 0, 2 * MIB) == 2 * MIB && equal(same.base, 2 * MIB, 0));
  /* Truncating to a terabyte is instant and sparse; what is added reads as zeros, or fails where that is asked for. */
  EXPECT(ftruncate(fd, 1LL << 40) == 0);
  EXPECT(one(&ior, &iov, iov.base, fd, 1ULL << 39, MIB) == MIB && iov.base[0] == 0 && iov.base[MIB - 1] == 0);
  EXPECT(one(&strict, &iov, iov.base, fd, 1ULL << 39, MIB) == -ENODATA);
  EXPECT(one(&strict, &iov, iov.base, fd, 0, 2 * MIB) == 2 * MIB);
  /* It may be renamed meanwhile, and given another name. */
  snprintf(other, sizeof(other), "%s.renamed", path);
  EXPECT(rename(path, other) == 0 && one(&ior, &iov, iov.base, fd, 5, 100) == 100 && equal(iov.base, 100, 5));
  EXPECT(hf3fs_hardlink(other, path) == 0 && hf3fs_hardlink(other, path) == EEXIST);
  EXPECT(hf3fs_punchhole(fd, 1, &start, &end, 0) == 0);
  EXPECT(one(&ior, &iov, iov.base, fd, 0, 2 * MIB) == 2 * MIB && iov.base[0] == 0 && equal(iov.base + MIB, MIB, MIB));
  EXPECT(hf3fs_punchhole(fd, 1, &end, &start, 0) == EINVAL && hf3fs_punchhole(-1, 1, &start, &end, 0) == EBADF);
  hf3fs_iordestroy(&ior);
  hf3fs_iordestroy(&strict);
  hf3fs_iovdestroy(&wrapped);
  EXPECT(wrapped.base == iov.base);
  hf3fs_iovdestroy(&same);
  EXPECT(one(&ior, &iov, iov.base, fd, 0, 1) == -EINVAL);
  hf3fs_iovdestroy(&iov);
}

/* A shared memory file is cut while it is being read into. */
static void check_cut(const char *directory) {
  struct hf3fs_iov iov;
  struct hf3fs_ior ior;
  char name[300];
  EXPECT(hf3fs_iovcreate(&iov, mount, 8 * MIB, 0, -1) == 0);
  EXPECT(hf3fs_iorcreate(&ior, mount, 8, true, 0, -1) == 0);
  int fd = open_file(directory, "cut", O_RDWR | O_CREAT);
  static uint8_t data[MIB];
  EXPECT(pwrite(fd, data, sizeof(data), 0) == sizeof(data) && hf3fs_reg_fd(fd, 0) < 0);
  const uint8_t *id = (const uint8_t *)iov.id;
  int length = snprintf(name, sizeof(name), "/dev/shm/hf3fs-iov-");
  for (int i = 0; i < 16; i++)
    length += snprintf(name + length, sizeof(name) - length, i == 4 || i == 6 || i == 8 || i == 10 ? "-%02x" : "%02x", id[i]);
  for (int i = 0; i < 8; i++)
    EXPECT(hf3fs_prep_io(&ior, &iov, true, iov.base + (size_t)i * MIB, fd, 0, MIB, NULL) == i);
  EXPECT(hf3fs_submit_ios(&ior) == 0 && truncate(name, 4096) == 0);
  /* However far they were: each has an end. */
  for (int got = 0; got < 8;) {
    struct hf3fs_cqe cqes[8];
    int more = hf3fs_wait_for_ios(&ior, cqes, 8, 1, NULL);
    EXPECT(more > 0);
    got += more;
  }
  EXPECT(one(&ior, &iov, iov.base, fd, 0, 1) == -EFAULT);
  hf3fs_iordestroy(&ior);
  hf3fs_iovdestroy(&iov);
}

/* Announce memory and a ring, say so, and stay. */
static void check_stay(const char *directory) {
  struct hf3fs_iov iov;
  struct hf3fs_ior ior;
  struct hf3fs_cqe cqe;
  EXPECT(hf3fs_iovcreate(&iov, mount, MIB, 0, -1) == 0 && hf3fs_iorcreate(&ior, mount, 8, true, 4, -1) == 0);
  int fd = open_file(directory, "stay", O_RDWR | O_CREAT);
  EXPECT(hf3fs_reg_fd(fd, 0) < 0);
  /* One of a batch of four does not begin. */
  EXPECT(hf3fs_prep_io(&ior, &iov, true, iov.base, fd, 0, 1, NULL) >= 0 && hf3fs_submit_ios(&ior) == 0);
  printf("ready\n");
  fflush(stdout);
  int waited = hf3fs_wait_for_ios(&ior, &cqe, 1, 1, NULL);
  printf("%d\n", waited);
}

int main(int argc, char **argv) {
  if (argc != 4) return 2;
  mount = argv[2];
  const struct {
    const char *name;
    void (*check)(const char *directory);
  } checks[] = {{"batches", check_batches},
                {"errors", check_errors},
                {"memory", check_memory},
                {"cut", check_cut},
                {"stay", check_stay}};
  for (size_t i = 0; i < sizeof(checks) / sizeof(checks[0]); i++)
    if (strcmp(checks[i].name, argv[1]) == 0) {
      checks[i].check(argv[3]);
      return 0;
    }
  return 2;
}
