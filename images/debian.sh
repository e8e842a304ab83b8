# shellcheck shell=bash
# Sourced by the scripts that make images: how they speak and fail, and Debian's packages, which are downloaded once and
# shellcheck disable=SC2154,SC2034
# kept unpacked in the user's cache directory.
#
# The script that sources this sets `program`, its name in messages, and calls make_work_directory before anything else
# but step and bad_usage; it may define `at_exit`, which runs before the work directory goes. Set here: `work`, a
# directory that is removed at the end unless keep=yes; by prepare_cache: `busybox`, a static one; `kernel`, an unpacked
# kernel package with its list of modules; `release`, its version.

cache=${XDG_CACHE_HOME:-$HOME/.cache}/llfree-vmm/testbed
keep=no

step() { echo "==> $SECONDS s: $*"; }
# How long it will take, before it begins: from sums of times on two cores, to the minute. Downloads come on top.
takes() { # SECONDS
    local minutes=$((($1 + 30) / 60))
    if ((minutes < 1)); then minutes=1; fi
    echo "$program: takes about $minutes min on two cores, and the time of what has to be downloaded first" >&2
}
fail() { # REASON [STATUS]
    verdict=failed
    echo "$program: FAILED ($1; $SECONDS s)"
    exit "${2:-1}"
}
bad_usage() { echo "$program: $1; see --help" >&2 && exit 2; }
number() { # OPTION VALUE MINIMUM
    if ! [[ $2 =~ ^[0-9]{1,7}$ ]] || ((10#$2 < $3)); then
        bad_usage "$1 needs a whole number, at least $3, not '$2'"
    fi
    echo $((10#$2))
}

make_work_directory() {
    work=$(mktemp -d "${TMPDIR:-/tmp}/$program.XXXXXX")
    unpacking=$cache/unpacking.$$
    trap clean_up EXIT
    trap 'fail interrupted 130' INT
    trap 'fail terminated 143' TERM HUP
}

clean_up() {
    if declare -F at_exit >/dev/null; then at_exit; fi
    rm -rf "$unpacking"
    if [[ $keep == yes ]]; then echo "$program: kept $work" >&2; else rm -rf "$work"; fi
    [[ -n ${verdict-} ]] || echo "$program: FAILED (stopped by the error above; $SECONDS s)"
}

quietly() { # DEED COMMAND ...: the output of COMMAND is shown only if it fails
    "${@:2}" >"$work/log" 2>&1 && return
    tail -n 15 "$work/log"
    fail "could not $1"
}

# A fresh container has no package lists, and old ones name files that are gone: root renews them before it fetches.
refresh_package_lists() {
    [[ $EUID == 0 && -z ${lists_are_fresh-} ]] || return 0
    step "apt-get update"
    lists_are_fresh=yes
    # Others may hold its lock, as they may dpkg's; for this one apt-get itself does not wait.
    local end=$((SECONDS + 300))
    until LC_ALL=C apt-get update >"$work/log" 2>&1; do
        if ! grep -q '^E: Could not get lock' "$work/log" || ((SECONDS >= end)); then
            echo "$program: it failed; going on with the old lists"
            return
        fi
        sleep 3
    done
}

install_package() { # COMMAND PACKAGE: installs PACKAGE if there is no COMMAND
    ! command -v "$1" >/dev/null || return 0
    ((EUID == 0)) || fail "$1 is missing; as root: apt-get install $2"
    refresh_package_lists
    step "installing $2"
    # Others install as well: another run of ours, or the machine's own updates.
    quietly "install $2" env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 install -y \
        --no-install-recommends "$2"
}

# Unpacks PACKAGE into $cache/PACKAGE without installing it, completely or not at all.
fetch_package() {
    refresh_package_lists
    step "fetching $1"
    quietly "download $1" env -C "$work" apt-get -o APT::Sandbox::User=root download "$1"
    mkdir -p "$unpacking"
    quietly "unpack $1" dpkg-deb -x "$work/$1"_*.deb "$unpacking"
    rm "$work/$1"_*.deb
    [[ $1 != linux-image-* ]] || quietly "list modules" "$busybox" depmod -b "$unpacking" "${1#linux-image-}"
    rm -rf "${cache:?}/$1"
    mv -T "$unpacking" "$cache/$1"
}

# Debian's source of a kernel, and what builds it.
fetch_kernel_source() { # VERSION
    [[ -d $cache/linux-source-$1 ]] || fetch_package "linux-source-$1"
    install_package gcc gcc
    install_package make make
    install_package patch patch
    install_package flex flex
    install_package bison bison
    install_package bc bc
    [[ -e /usr/include/libelf.h ]] || install_package libelf.h libelf-dev
}

# The headers of the kernel at hand, to build a module with: $headers. They name each other by where they are installed.
fetch_kernel_headers() {
    local common kbuild
    common=linux-headers-${release%-amd64}-common
    headers=$cache/$common/usr/src/linux-headers-$release
    [[ ! -e $headers/Makefile ]] || return 0
    kbuild=$(apt-cache depends "linux-headers-$release" | sed -n 's/.*Depends: \(linux-kbuild-.*\)/\1/p')
    [[ -n $kbuild ]] || fail "apt knows no headers of $release, which is in $cache; remove it to fetch the newest kernel"
    fetch_package "$kbuild"
    fetch_package "linux-headers-$release"
    fetch_package "$common"
    # One tree, with what the others have.
    cp -R "$cache/$kbuild/usr/." "$cache/$common/usr"
    cp -R "$cache/linux-headers-$release/usr/." "$cache/$common/usr"
    rm -rf "${cache:?}/$kbuild" "${cache:?}/linux-headers-$release"
    echo "include $cache/$common/usr/src/$common/Makefile" >"$headers/Makefile"
    install_package gcc gcc
    install_package make make
}

# Runs DEED with the cache to itself: of several first runs at once, one fetches.
with_cache_locked() { with_lock "$cache/lock" "$@"; }

with_lock() { # FILE DEED ...
    local lock
    mkdir -p "$cache"
    exec {lock}>"$1"
    flock "$lock"
    "${@:2}"
    # Here only if it did well, or if the caller asks whether it did.
    local status=$?
    exec {lock}>&-
    return "$status"
}

prepare_cache() { # [VERSION], 6.1 or 6.12
    local package version=${1:-6.1} pattern
    case $version in
        6.1) pattern='linux-image-6\.1\.0-[0-9]+-amd64' ;;
        6.12) pattern='linux-image-6\.12\.[0-9]+\+deb[0-9]+-amd64' ;;
    esac
    busybox=$cache/busybox-static/bin/busybox
    [[ -x $busybox ]] || fetch_package busybox-static
    kernel=$(find "$cache" -maxdepth 1 -regextype egrep -regex ".*/$pattern" | sort -V | tail -n 1)
    if [[ -z $kernel ]]; then
        refresh_package_lists
        package=$(apt-cache search -n "^$pattern\$" | cut -d' ' -f1 | sort -V | tail -n 1)
        [[ -n $package ]] || fail "apt knows no $pattern of Debian 12; as root: apt-get update"
        fetch_package "$package"
        kernel=$cache/$package
    fi
    release=${kernel##*/linux-image-}
}

# Paths of MODULE ... and of what they need, each after those it needs: a line of modules.dep, reversed, is the order to
# load in.
modules_in_load_order() {
    local directory=$kernel/lib/modules/$release module
    for module in "$@"; do
        # One that is built in needs nothing.
        grep -E "/$module\.ko(\.xz)?:" "$directory/modules.dep" | tr -s ': ' '\n' | tac ||
            grep -qE "/$module\.ko" "$directory/modules.builtin"
    done | awk -v directory="$directory" 'NF && !seen[$0]++ { print directory "/" $0 }'
}

# Copies MODULE ... and what they need to DIRECTORY; numbers make its sorted listing the load order.
copy_modules() { # DIRECTORY MODULE ...
    local module count=100
    modules_in_load_order "${@:2}" >"$work/modules"
    while read -r module; do
        cp "$module" "$1/$((count++))-${module##*/}"
    done <"$work/modules"
    find "$1" -name '*.xz' -exec "$busybox" unxz {} +
}

pack_initramfs() { # TREE FILE
    (cd "$1" && find . | "$busybox" cpio -o -H newc | gzip -1) >"$2"
}
