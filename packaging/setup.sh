#!/usr/bin/env bash
# Brings a Debian or Ubuntu machine to where Landfall's lab and tests run: kernel features, system packages,
# and the locked virtual environment in build/venv. Run again, it skips what is there.
#
#   setup.sh [--test] [--bench] [--guest] [--vm] [--venv-only]
#
# --test adds promtool, which judges metrics and alerts; --bench adds the peers of the benchmarks; --guest the guest that has device-mapper, and LVM;
# --vm what the VM lab runs on (vagrant/README.md); --venv-only makes the virtual environment alone, for which root is not needed.
# Exit status 2 means that this machine cannot run the lab as it is; the one sentence printed says how to mend it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf 'landfall: %s\n' "$*" >&2; }
refuse() { say "$*"; exit 2; }

test=no bench=no guest=no vm=no venv_only=no
for argument in "$@"; do
    case "$argument" in
        --test) test=yes ;;
        --bench) bench=yes ;;
        --guest) guest=yes ;;
        --vm) vm=yes ;;
        --venv-only) venv_only=yes ;;
        *) refuse "unknown argument $argument; use --test, --bench, --guest, --vm or --venv-only." ;;
    esac
done

lab_packages=(samba smbclient systemd openssh-server openssh-client xfsprogs btrfs-progs e2fsprogs attr acl nftables iproute2
    util-linux mount)
bench_packages=(fio qemu-utils libnbd-bin nbdkit rsync)
guest_packages=(user-mode-linux lvm2 thin-provisioning-tools kmod iproute2 nfs-kernel-server nfs-common)
vm_packages=(vagrant vagrant-libvirt libvirt-daemon libvirt-daemon-system libvirt-clients qemu-system-x86 qemu-utils dnsmasq-base
    iptables mmdebstrap debian-archive-keyring busybox-static cpio grub-common grub-pc-bin fdisk kmod openssh-client smbclient zstd)
venv=build/venv

check_kernel() {
    [ "$(uname -s)" = Linux ] || refuse "Landfall's lab needs Linux; run it on a Linux machine or in a virtual machine with one."
    [ "$(id -u)" = 0 ] || refuse "the lab makes network namespaces, mounts and loop devices, so it needs root; run it again with sudo."
    [ -e /dev/loop-control ] || modprobe -q loop 2>/dev/null || true
    [ -e /dev/loop-control ] ||
        refuse "this kernel offers no loop devices (/dev/loop-control is missing); load the module loop, or in a container run it with --privileged."
    local fs
    for fs in xfs btrfs; do
        grep -qw "$fs" /proc/filesystems || modprobe -q "$fs" 2>/dev/null || true
    done
    grep -qwE 'xfs|btrfs' /proc/filesystems ||
        refuse "this kernel has neither XFS nor btrfs, of which the lab needs one; install the kernel's full set of modules (Ubuntu: linux-modules-extra-$(uname -r)) or boot a distribution kernel."
}

missing_packages() {
    local package
    for package in "$@"; do
        [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || printf '%s\n' "$package"
    done
}

# Debian starts a service when its package is installed. The lab runs its own sshd and smbd inside its nodes; the machine's
# are neither wanted nor touched, so units that this installation brings are masked meanwhile and left disabled.
install_packages() {
    local missing=("$@") units=() package
    say "installing missing system packages: ${missing[*]}"
    command -v apt-get >/dev/null || refuse "these programs are missing and there is no apt-get; install the packages of your distribution for: ${missing[*]}."
    if [ -d /run/systemd/system ]; then
        for package in "${missing[@]}"; do
            case "$package" in
                samba) units+=(smbd.service nmbd.service samba-ad-dc.service) ;;
                openssh-server) units+=(ssh.service ssh.socket) ;;
                nfs-kernel-server) units+=(nfs-server.service rpcbind.service rpcbind.socket) ;;
                nbdkit | nftables) ;;
            esac
        done
    fi
    [ ${#units[@]} = 0 ] || systemctl --quiet --runtime mask "${units[@]}"
    local status=0
    apt_install "${missing[@]}" || { apt-get update -q >&2 && apt_install "${missing[@]}"; } || status=$?
    if [ ${#units[@]} != 0 ]; then
        systemctl --quiet --runtime unmask "${units[@]}" || true
        systemctl --quiet disable "${units[@]}" 2>/dev/null || true
    fi
    [ "$status" = 0 ] || refuse "apt-get could not install ${missing[*]}; install them by hand and run this again."
}

apt_install() {
    DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get install -q -y --no-install-recommends "$@" >&2
}

# Prometheus and its hundreds of megabytes are not wanted, only the one program of it; so it is unpacked here and not installed.
fetch_promtool() {
    [ ! -x build/promtool/usr/bin/promtool ] || return 0
    command -v promtool >/dev/null && return 0
    say "fetching promtool"
    rm -rf build/promtool
    mkdir -p build/promtool
    (cd build/promtool && { apt-get download -qq prometheus || { apt-get update -q >&2 && apt-get download -qq prometheus; }; } >&2 &&
        dpkg-deb -x prometheus_*.deb . && rm prometheus_*.deb) || refuse "promtool could not be fetched; install the package prometheus and run this again."
}

find_python() {
    local candidate
    for candidate in python3 python3.14 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    return 1
}

require_python() {
    python=$(find_python) && return
    [ "$(id -u)" = 0 ] || refuse "there is no Python 3.11 or newer with venv; install python3-venv (as root: apt-get install python3-venv)."
    install_packages python3 python3-venv
    python=$(find_python) && return
    install_packages python3.11 python3.11-venv
    python=$(find_python) || refuse "Landfall needs Python 3.11 or newer and this distribution has none; use Debian 12, Ubuntu 24.04 or newer."
}

# The stamp names all that the environment was made from; it is written last, so a broken-off run is done again.
# Of pyproject.toml only what concerns the installation counts: a changed lint rule makes no environment anew.
make_venv() {
    local wanted
    mkdir -p build
    exec 9>build/setup.lock
    flock 9
    wanted=$( (cat requirements-dev.txt; sed '/^\[tool\.mypy\]/,$d' pyproject.toml) | sha256sum | cut -d ' ' -f 1)
    if [ -x "$venv/bin/python" ] && [ "$(cat "$venv/landfall-stamp" 2>/dev/null)" = "$wanted $PWD" ]; then
        return
    fi
    require_python
    say "making the virtual environment $venv with $python"
    rm -rf "$venv"
    "$python" -m venv "$venv"
    "$venv/bin/pip" install -qq --disable-pip-version-check --require-hashes -r requirements-dev.txt
    "$venv/bin/pip" install -qq --disable-pip-version-check --no-deps --no-build-isolation -e .
    printf '%s %s\n' "$wanted" "$PWD" >"$venv/landfall-stamp"
}

if [ "$venv_only" = no ]; then
    check_kernel
    wanted_packages=("${lab_packages[@]}")
    [ "$bench" = no ] || wanted_packages+=("${bench_packages[@]}")
    [ "$guest" = no ] || wanted_packages+=("${guest_packages[@]}")
    [ "$vm" = no ] || wanted_packages+=("${vm_packages[@]}")
    mapfile -t missing < <(missing_packages "${wanted_packages[@]}")
    [ ${#missing[@]} = 0 ] || install_packages "${missing[@]}"
    [ "$test" = no ] || fetch_promtool
fi
make_venv
