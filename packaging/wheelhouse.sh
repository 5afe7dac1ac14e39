#!/usr/bin/env bash
# Builds build/wheelhouse: all that a node without internet installs Landfall from, for the node's Python, not this machine's.
# Run again with nothing changed, it does nothing. Prints nothing on standard output.
#
#   wheelhouse.sh [--python 3.11] [--machine x86_64]
#
# requirements.txt and landfall.txt name every file in it by its digest, wheelhouse.tar holds them all, and `release` is the digest of
# these two and names what was installed. pip takes them with --no-index --require-hashes.
# Exit status 2 means that it could not be built; the one sentence printed says why.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf 'landfall: %s\n' "$*" >&2; }
refuse() { say "$*"; exit 2; }

python=3.11 machine=x86_64
while [ $# -gt 0 ]; do
    case "$1" in
        --python) python=${2-}; shift ;;
        --machine) machine=${2-}; shift ;;
        *) refuse "unknown argument $1; use --python VERSION or --machine NAME." ;;
    esac
    shift || refuse "an argument lacks its value."
done
[[ "$python" =~ ^3\.(1[1-9]|[2-9][0-9])$ ]] || refuse "a node needs Python 3.11 or newer, not '$python'."
[[ "$machine" =~ ^[a-z0-9_]+$ ]] || refuse "'$machine' is no machine's name; x86_64 and aarch64 are."

mkdir -p build
exec 9>build/wheelhouse.lock
flock 9
bash packaging/setup.sh --venv-only
pip=(build/venv/bin/pip --disable-pip-version-check --quiet)
made=build/wheelhouse

wanted=$({ printf '%s\n' "$python" "$machine"; cat requirements.txt pyproject.toml
    find agent mgmt -type f ! -path '*/__pycache__/*' -print0 | LC_ALL=C sort -z | xargs -0 cat; } | sha256sum | cut -d ' ' -f 1)
[ "$(cat "$made/stamp" 2>/dev/null)" != "$wanted" ] || exit 0

say "building the wheelhouse for Python $python on $machine"
fresh=build/wheelhouse.new
rm -rf "$fresh" build/wheelhouse.source
mkdir -p "$fresh"
trap 'rm -rf "$fresh" build/wheelhouse.source' EXIT

# The platforms that wheels are made for, of any glibc that a Debian with this Python has.
platforms=()
for glibc in 36 35 34 31 28 27 26 24 17 12 5; do platforms+=(--platform "manylinux_2_${glibc}_$machine"); done
platforms+=(--platform "manylinux2014_$machine" --platform "linux_$machine")
"${pip[@]}" download --require-hashes --only-binary=:all: --implementation cp --python-version "$python" --abi "cp${python/./}" --abi abi3 --abi none \
    "${platforms[@]}" --dest "$fresh" --requirement requirements.txt ||
    refuse "not every package of requirements.txt is to be had for Python $python on $machine; pip's words are above."

# Out of a copy, so that setuptools leaves nothing in the working tree, and with the time of nothing in it: the same tree gives the same wheel.
mkdir build/wheelhouse.source
cp -r agent mgmt pyproject.toml README.md build/wheelhouse.source/
find build/wheelhouse.source -name __pycache__ -prune -exec rm -rf {} +
SOURCE_DATE_EPOCH=315532800 "${pip[@]}" wheel --no-deps --no-build-isolation --no-index --wheel-dir "$fresh" ./build/wheelhouse.source
own=("$fresh"/landfall-*.whl)
version=$(basename "${own[0]}" | cut -d - -f 2)

cp requirements.txt "$fresh/requirements.txt"
printf 'landfall==%s --hash=sha256:%s\n' "$version" "$(sha256sum <"${own[0]}" | cut -d ' ' -f 1)" >"$fresh/landfall.txt"
printf '%s\n' "$python" >"$fresh/python"
cat "$fresh/python" "$fresh/requirements.txt" "$fresh/landfall.txt" | sha256sum | cut -c 1-16 >"$fresh/release"
tar --create --file "$fresh/wheelhouse.tar" --directory "$fresh" --sort=name --mtime=@315532800 --owner=0 --group=0 --numeric-owner \
    --exclude=./wheelhouse.tar .
printf '%s\n' "$wanted" >"$fresh/stamp"
rm -rf "$made"
mv "$fresh" "$made"
