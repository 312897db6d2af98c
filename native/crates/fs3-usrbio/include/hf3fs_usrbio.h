/* User-space I/O of an fs3 mount, as programs for 3FS know it. Link with -lhf3fs_api_shared. See docs/usrbio.md.
 *
 * An iov is shared memory that data is read into or written from. A ring (ior) is how I/Os get to the mount daemon:
 * prepare, submit, wait. Functions return 0 or a negative errno unless they say otherwise. */
#ifndef HF3FS_USRBIO_H
#define HF3FS_USRBIO_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <time.h>

#ifdef __cplusplus
extern "C" {
#endif

struct timespec;

#define HF3FS_SUPER_MAGIC 0x8f3f5fff

/* Flags of hf3fs_iorcreate4. */
#define HF3FS_IOR_ALLOW_READ_UNCOMMITTED 1 /* accepted, without effect: replicas show only what is committed */
#define HF3FS_IOR_FORBID_READ_HOLES 2      /* a read that meets a hole fails with -ENODATA instead of giving zeros */

typedef void *hf3fs_iov_handle;
typedef void *hf3fs_ior_handle;

struct hf3fs_iov {
  uint8_t *base;
  hf3fs_iov_handle iovh; /* NULL of wrapped memory */
  char id[16];
  char mount_point[256];
  size_t size;       /* bytes */
  size_t block_size; /* bytes that one I/O may not cross; 0: it may lie anywhere */
  int numa;
};

struct hf3fs_ior {
  struct hf3fs_iov iov; /* the ring's own memory */
  hf3fs_ior_handle iorh;
  char mount_point[256];
  bool for_read; /* a ring reads, or it writes */
  int io_depth;  /* > 0: exactly so many I/Os begin together; 0: all that are prepared; < 0: at most so many */
  int priority;  /* kept, without effect */
  int timeout;   /* ms; with io_depth < 0: how long a batch that is not full waits */
  uint64_t flags;
};

struct hf3fs_cqe {
  int32_t index; /* what hf3fs_prep_io returned */
  int32_t reserved;
  int64_t result; /* bytes, fewer only at the end of the file; or a negative errno */
  const void *userdata;
};

#if defined(__x86_64__) && (defined(__cplusplus) || (defined(__STDC_VERSION__) && __STDC_VERSION__ >= 201112L))
#ifdef __cplusplus
#define HF3FS_ASSERT(condition) static_assert(condition, #condition)
#else
#define HF3FS_ASSERT(condition) _Static_assert(condition, #condition)
#endif
HF3FS_ASSERT(sizeof(struct hf3fs_iov) == 312 && offsetof(struct hf3fs_iov, iovh) == 8);
HF3FS_ASSERT(offsetof(struct hf3fs_iov, id) == 16 && offsetof(struct hf3fs_iov, mount_point) == 32);
HF3FS_ASSERT(offsetof(struct hf3fs_iov, size) == 288 && offsetof(struct hf3fs_iov, block_size) == 296);
HF3FS_ASSERT(offsetof(struct hf3fs_iov, numa) == 304);
HF3FS_ASSERT(sizeof(struct hf3fs_ior) == 600 && offsetof(struct hf3fs_ior, iorh) == 312);
HF3FS_ASSERT(offsetof(struct hf3fs_ior, mount_point) == 320 && offsetof(struct hf3fs_ior, for_read) == 576);
HF3FS_ASSERT(offsetof(struct hf3fs_ior, io_depth) == 580 && offsetof(struct hf3fs_ior, priority) == 584);
HF3FS_ASSERT(offsetof(struct hf3fs_ior, timeout) == 588 && offsetof(struct hf3fs_ior, flags) == 592);
HF3FS_ASSERT(sizeof(struct hf3fs_cqe) == 24 && offsetof(struct hf3fs_cqe, result) == 8);
HF3FS_ASSERT(offsetof(struct hf3fs_cqe, userdata) == 16);
#undef HF3FS_ASSERT
#endif

/* Whether a descriptor is one of a mount. */
bool hf3fs_is_hf3fs(int fd);

/* The mountpoint that an existing path is on: its length with the zero byte, or -1. It is written only if `size` suffices. */
int hf3fs_extract_mount_point(char *hf3fs_mount_point, int size, const char *path);

/* Make shared memory of `size` bytes and announce it to the mount; `numa` < 0: on any node. */
int hf3fs_iovcreate(struct hf3fs_iov *iov, const char *hf3fs_mount_point, size_t size, size_t block_size, int numa);
/* Map memory that another process of the same user announced as `id`. */
int hf3fs_iovopen(struct hf3fs_iov *iov, const uint8_t id[16], const char *hf3fs_mount_point, size_t size,
                  size_t block_size, int numa);
/* Use memory that is mapped at `base` and was announced as `id` (a symlink <mount>/3fs-virt/iovs/<uuid>[.b<block>] to the
 * file in /dev/shm). */
int hf3fs_iovwrap(struct hf3fs_iov *iov, void *base, const uint8_t id[16], const char *hf3fs_mount_point, size_t size,
                  size_t block_size, int numa);
/* Remove the file in /dev/shm; the memory stays mapped and announced. */
void hf3fs_iovunlink(struct hf3fs_iov *iov);
/* Withdraw and unmap. Does nothing to wrapped memory. */
void hf3fs_iovdestroy(struct hf3fs_iov *iov);

/* Bytes of a ring for so many I/Os; 0 when there cannot be one. */
size_t hf3fs_ior_size(int entries);
/* Make a ring in which exactly `entries` I/Os may be outstanding (1 to 65536). It belongs to this process. */
int hf3fs_iorcreate(struct hf3fs_ior *ior, const char *hf3fs_mount_point, int entries, bool for_read, int io_depth,
                    int numa);
int hf3fs_iorcreate2(struct hf3fs_ior *ior, const char *hf3fs_mount_point, int entries, bool for_read, int io_depth,
                     int priority, int numa);
int hf3fs_iorcreate3(struct hf3fs_ior *ior, const char *hf3fs_mount_point, int entries, bool for_read, int io_depth,
                     int priority, int timeout, int numa);
int hf3fs_iorcreate4(struct hf3fs_ior *ior, const char *hf3fs_mount_point, int entries, bool for_read, int io_depth,
                     int timeout, int numa, uint64_t flags);
/* End a ring. Results that were not fetched are lost; I/Os that have begun still end. */
void hf3fs_iordestroy(struct hf3fs_ior *ior);

/* Let rings use an open file: <= 0, which hf3fs_prep_io takes as it takes `fd`; or a positive errno. The file stays open
 * for them until it is withdrawn, also when `fd` is closed; its number cannot be registered again before. */
int hf3fs_reg_fd(int fd, uint64_t flags);
void hf3fs_dereg_fd(int fd);

/* I/Os that may be outstanding. */
int hf3fs_io_entries(const struct hf3fs_ior *ior);

/* Prepare to read (or write) `len` bytes at `off` into `ptr`, which lies in `iov`. The index of the I/O (>= 0), or -EAGAIN
 * (the ring is full), -EBADF (not registered), -EACCES (not open for that), -EINVAL. It may begin at once. */
int hf3fs_prep_io(const struct hf3fs_ior *ior, const struct hf3fs_iov *iov, bool read, void *ptr, int fd, size_t off,
                  uint64_t len, const void *userdata);
/* Have what is prepared begin. */
int hf3fs_submit_ios(const struct hf3fs_ior *ior);
/* Wait for at least `min_results` (not more than `cqec`) results, until `abs_timeout` of CLOCK_REALTIME (NULL: for ever). How
 * many were fetched, in the order of preparation: 0 when the time was over; -ENOTCONN when the mount is gone. */
int hf3fs_wait_for_ios(const struct hf3fs_ior *ior, struct hf3fs_cqe *cqes, int cqec, int min_results,
                       const struct timespec *abs_timeout);

/* Give a file another name. 0 or a positive errno. */
int hf3fs_hardlink(const char *target, const char *link_name);
/* Make the ranges start[i] to end[i] holes; the file keeps its length. 0 or a positive errno. */
int hf3fs_punchhole(int fd, int n, const size_t *start, const size_t *end, size_t flags);

#ifdef __cplusplus
}
#endif

#endif
