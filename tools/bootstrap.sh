#!/bin/sh
# usage: tools/bootstrap.sh PYTHON [test] [guest] [cost]
# Checks what building and running (with "test", testing; with "guest", tests in tools/guest; with "cost", tools/cost.py)
# muenfast takes from the system.
# As root with apt-get the missing packages are installed, exactly those; else they are named,
# and the exit status is 1 if the build cannot do without them. NO_INSTALL=1: name them only.
set -u
python=${1:-python3}
[ $# = 0 ] || shift
goals=" $* "
PATH=$PATH:/usr/sbin:/sbin      # where an ordinary user's PATH lacks mkfs and losetup

need= need_why=                 # without these there is no build
want= want_why=                 # without these a part is left out
need() { need="$need $1"; need_why="$need_why${need_why:+, }$2"; }
want() { case " $want " in *" $1 "*) ;; *) want="$want $1"; want_why="$want_why${want_why:+, }$2";; esac; }
have() { command -v "$1" >/dev/null 2>&1; }
die() { echo "muenfast: $*" >&2; exit 1; }
ask() { "$python" -c "$1" 2>/dev/null; }

if ! have "$python"; then
    case $python in
    python3) need "python3 python3-venv python3-dev" "Python to run on" ;;
    python3.*) need "$python $python-venv $python-dev" "the Python that was asked for" ;;
    *) die "$python: no such program (make PYTHON=... names the interpreter)" ;;
    esac
else
    ask 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        die "$python is $("$python" -V 2>&1), Python >= 3.10 is needed; a newer one is picked with: make PYTHON=python3.12 ..."
    # Only the system's own Python gets its missing parts from apt.
    version=$(ask 'import sys; print("python%d.%d" % sys.version_info[:2])')
    missing=
    ask 'import venv, ensurepip' || missing="$missing $version-venv"
    ask 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' ||
        missing="$missing $version-dev"
    if [ -n "$missing" ]; then
        [ "$(ask 'import sys; print(sys.base_prefix)')" = /usr ] ||
            die "$python lacks ensurepip or its C headers, and is not the system's: install it with both"
        need "${missing# }" "venv and C headers of $python"
    fi
fi

# gcc without libc6-dev compiles nothing, so compile something.
cc=${CC:-$(ask 'import sysconfig; print(sysconfig.get_config_var("CC"))')}
[ -n "$cc" ] || cc=gcc
# shellcheck disable=SC2086  # CC may be several words
if ! printf '#include <stdatomic.h>\n#include <stdio.h>\nint main(void) { return 0; }\n' |
        $cc -x c -o /dev/null - 2>/dev/null; then
    [ -z "${CC:-}" ] || die "CC=$CC does not compile a C11 program"
    need "gcc libc6-dev" "a C compiler"
fi

if [ -z "${PKG_CONFIG:-}" ]; then     # one that was chosen is believed
    have pkg-config || want pkg-config "to find libfuse3 and liburing"
    pkg-config --exists fuse3 2>/dev/null || [ -e /usr/include/fuse3/fuse_lowlevel.h ] ||
        want libfuse3-dev "the FUSE front end"
    pkg-config --exists liburing 2>/dev/null || [ -e /usr/include/liburing.h ] ||
        want liburing-dev "files and faster block devices by io_uring"
fi
have mkfs.ext4 && have fsck.ext4 || want e2fsprogs "file systems on the disks"
have losetup && have mount || want mount "to attach and mount the disks"
case $goals in *" test "*)
    have fio || want fio "load for the tests"
    have nbdinfo && have nbdcopy || want libnbd-bin "NBD clients for the tests"
    have qemu-img && have qemu-io || want qemu-utils "NBD clients for the tests"
    have sfdisk || want fdisk "partition tables for the tests"
    have ip && have tc && have ping || want "iproute2 iputils-ping" "network namespaces for the tests"
    have iptables && have ip6tables || want iptables "marks of packets in the tests"
    have nft || want nftables "marks of packets in the tests"
    have systemd-analyze || want systemd "its units are verified in the tests"
    have spin || want spin "the models in tests/model"
    [ ! -e .git ] || have git || want git "the sdist's contents are compared with git's"
esac
case $goals in *" guest "*)
    [ "$(uname -m)" = x86_64 ] || die "the guest runs on x86-64 only"
    have qemu-system-x86_64 || need qemu-system-x86 "the guest's machine"
    # A busybox that needs libraries ends before the root file system is there.
    have busybox && ! ldd "$(command -v busybox)" >/dev/null 2>&1 || need busybox-static "the guest's first process"
    have depmod && have modprobe || need kmod "modules of the guest's kernel"
    [ -e /usr/share/keyrings/debian-archive-keyring.gpg ] || [ -e /usr/share/keyrings/debian-archive-keyring.pgp ] ||
        need debian-archive-keyring "signatures of the guest's kernel"
    have cryptsetup || need cryptsetup-bin "disks that are encrypted"
    have lvm && have dmsetup || need "lvm2 dmsetup" "volumes on the disks"
    have nbd-client || need nbd-client "disks by NBD"
    have sfdisk || need fdisk "disks with partitions"
esac
case $goals in *" cost "*)
    # Its header, too, by which a program tells callgrind what to count.
    have valgrind && printf '#include <valgrind/callgrind.h>\n' | $cc -E -x c -o /dev/null - 2>/dev/null ||
        need valgrind "to count instructions"
esac

[ -n "$need$want" ] || exit 0
need=${need# } want=${want# }
if [ -n "${NO_INSTALL:-}" ]; then
    cannot="NO_INSTALL is set"
elif ! have apt-get; then
    cannot="no apt-get here"
elif [ "$(id -u)" != 0 ]; then
    cannot="not root"
else
    cannot=
fi
if [ -n "$cannot" ]; then
    sudo=; [ "$(id -u)" = 0 ] || sudo="sudo "
    [ -z "$want" ] || echo "muenfast: missing, parts are left out: $want ($want_why)" >&2
    [ -z "$need" ] || echo "muenfast: missing, needed: $need ($need_why)" >&2
    echo "muenfast: $cannot; on Debian or Ubuntu: ${sudo}apt-get install --no-install-recommends $need${need:+${want:+ }}$want" >&2
    [ -z "$need" ]; exit
fi

export DEBIAN_FRONTEND=noninteractive
log=$(mktemp) || exit 1
trap 'rm -f "$log"' EXIT
apt() { apt-get -q -o DPkg::Lock::Timeout=120 -o Acquire::Retries=2 "$@" >>"$log" 2>&1; }
# Package lists may be missing (fresh image) or so old that their files are gone from the mirror.
install() {
    # shellcheck disable=SC2086  # words are packages
    apt install -y --no-install-recommends $1 || { apt update && apt install -y --no-install-recommends $1; }
}
if [ -n "$need" ]; then
    echo "muenfast: installing $need ($need_why)"
    install "$need" || { cat "$log" >&2; die "apt-get could not install $need"; }
fi
if [ -n "$want" ]; then
    echo "muenfast: installing $want ($want_why)"
    install "$want" || { grep "^E:" "$log" >&2; echo "muenfast: apt-get could not install $want: going on without" >&2; }
fi
exit 0
