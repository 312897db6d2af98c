#!/bin/bash
# The first process of the guest, started twice: on the host's read-only root, which it covers with a writable layer, and
# then in there, where it makes the devices and runs the command. $rig is shared with the host; see rig.py.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
if [ "${1:-}" != inside ]; then
    mount -t proc proc /proc
    for word in $(</proc/cmdline); do case $word in rig=*) rig=${word#rig=} ;; esac; done
    mount -t tmpfs -o size=75% layer /run
    mkdir /run/upper /run/work /run/root
    mount -t overlay -o lowerdir=/,upperdir=/run/upper,workdir=/run/work root /run/root
    cd /run/root
    mount -t proc proc proc
    mount -t sysfs sysfs sys
    mount -t devtmpfs devtmpfs dev
    mkdir -p rig rig.out rig.disk
    mount -t hostfs -o "$rig" none rig
    exec chroot . /bin/bash /rig/guest.sh inside
fi

finish() {
    dmesg >/rig.out/dmesg.txt
    echo "$1" >/rig/status
    sync
    echo o >/proc/sysrq-trigger
    sleep 60
}

out=$(</rig/out)
mount -t hostfs -o "$out" none /rig.out
mount --bind /rig/cpuinfo /proc/cpuinfo # perftest wants a line "cpu MHz", which the guest's own has not
echo /rig/clock.so >/etc/ld.so.preload
mkdir -p /dev/pts /dev/shm
ln -s /proc/self/fd /dev/fd
ln -s fd/0 /dev/stdin
ln -s fd/1 /dev/stdout
ln -s fd/2 /dev/stderr
mount -t devpts devpts /dev/pts
mount -t tmpfs shm /dev/shm
mount -t tmpfs run /run
mount -t cgroup2 cgroup2 /sys/fs/cgroup
(mkfs.ext4 -q -m 0 -E lazy_itable_init=1,lazy_journal_init=1 /dev/ubda && mount -o noinit_itable /dev/ubda /rig.disk && chmod 1777 /rig.disk) || finish 125
ulimit -l unlimited
hostname rdma-rig
ip link set lo up
# siw refuses the loopback device; a pair of virtual cables serves both.
ip link add rd0 type veth peer name rd1
for i in 0 1; do ip addr add "10.9.$i.1/24" dev "rd$i" && ip link set "rd$i" mtu 9000 up; done
rdma link add rxe0 type rxe netdev rd0 && rdma link add siw0 type siw netdev rd1 || finish 125
# What the command writes goes to a terminal of its own, unchanged, and through a pipe: progress bars are for people. Who
# still writes when the command has ended is not waited for long.
stty -F /dev/tty1 raw -echo
bash /rig/command.sh > >(exec cat >/dev/tty1) 2>&1
status=$?
reader=$!
(sleep 1 && kill "$reader") 2>/dev/null &
wait "$reader" 2>/dev/null
finish "$status"
