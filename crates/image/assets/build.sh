# Runs in the default guest: makes a Debian system on /dev/vda from the archive on /dev/vdb, which has
# packages/, the lists `all` and `base` of their names, `settings` and `configure`.
set -e
. /parts/settings

step() { echo "RUSE-STEP $*"; }

# unpack DIRECTORY PACKAGE...: the files of packages, without a package manager.
unpack() {
    into=$1
    shift
    for package in "$@"; do dpkg-deb -x "/parts/packages/$package" "$into"; done
}

# A new system's directories as Debian has them, so that no package makes them otherwise. From Debian 13 on, base-files brings
# the links, and can do so only where there are none.
merge_usr() {
    mkdir -p "$1"
    for name in bin sbin lib lib64; do
        mkdir -p "$1/usr/$name"
        ln -s "usr/$name" "$1/$name"
    done
    mkdir -p "$1/dev" "$1/proc" "$1/sys"
}

step "making the file system"
merge_usr /tools
# shellcheck disable=SC2086
unpack /tools $TOOLS
mount -o bind /dev /tools/dev
# By their paths: the default guest has commands of its own by these names.
chroot /tools /sbin/mke2fs -q -t ext4 -L "$LABEL" /dev/vda
umount /tools/dev
mount -t ext4 -o noatime,nobarrier /dev/vda /mnt

step "unpacking the base system"
base_files=$(grep '^base-files_' /parts/base)
dpkg-deb -c "/parts/packages/$base_files" | grep -q ' \./bin -> ' || merge_usr /mnt
unpack /mnt "$base_files"
# shellcheck disable=SC2046
unpack /mnt $(grep -v '^base-files_' /parts/base)
# shellcheck disable=SC2086
unpack /mnt $KERNEL
# The kernel itself is outside, wherever the release has it.
rm -rf /mnt/boot/* /mnt/lib/modules/*/vmlinuz /mnt/usr/share/doc/linux-*

mkdir -p /mnt/parts
mount -o bind /parts /mnt/parts
mount -o bind /dev /mnt/dev
mount -t proc proc /mnt/proc
mount -t sysfs sys /mnt/sys
chroot /mnt /bin/sh /parts/configure

step "finishing"
umount /mnt/sys /mnt/proc /mnt/dev /mnt/parts
rmdir /mnt/parts
fstrim /mnt
umount /mnt
