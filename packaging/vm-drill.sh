#!/usr/bin/env bash
# From nothing to the verified result: host packages, box, three virtual machines, provisioned twice (the second time nothing may change),
# the drill with nas1 switched off in mid-transfer on each substrate and filesystem, the machines looked at after each, and all of it removed.
#
#   vm-drill.sh [--keep] [--at SHARE] [--seed N] [--only "SUBSTRATE/FS[/SCENARIO] ..."] [--scenarios SUBSTRATE/FS]
#
# --keep leaves the machines up at the end; --only holds these drills and no others (lvm-thin/ext4, or lvm-thin/ext4/link-cut, for instance);
# --scenarios holds every scenario of playbooks/scenarios on one substrate and filesystem; --at breaks transfers off there, not where a scenario says.
# What each drill left is in build/vm/runs/TIME/DRILL, all that was said of drills and checks in build/vm/runs/TIME/console.log.
# Exit status: 0 all drills clean; 2 this machine cannot or bad arguments; otherwise that of the step that failed, which is named with where its
# words are. The machines are removed all the same, unless --keep.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

begun=$SECONDS
say() { printf 'landfall: [%3d:%02d] %s\n' $(((SECONDS - begun) / 60)) $(((SECONDS - begun) % 60)) "$*" | tee -a "$runs/console.log" >&2; }
refuse() { printf 'landfall: %s\n' "$*" >&2; exit 2; }

keep=no at=() seed=1
drills="lvm-thin/ext4 lvm-thin/xfs lvm-snapshot/ext4 lvm-snapshot/xfs reflink/ext4"
while [ $# -gt 0 ]; do
    case "$1" in
        --keep) keep=yes ;;
        --at) at=(--at "${2-}"); shift ;;
        --seed) seed=${2-}; shift ;;
        --only) drills=${2-}; shift ;;
        --scenarios) drills=$(for found in playbooks/scenarios/*.yml; do printf '%s ' "${2-}/$(basename "$found" .yml)"; done); shift ;;
        *) refuse "unknown argument $1; use --keep, --at SHARE, --seed N, --only \"SUBSTRATE/FS[/SCENARIO] ...\" or --scenarios SUBSTRATE/FS." ;;
    esac
    shift || refuse "an argument lacks its value."
done
for drill in $drills; do
    [[ $drill =~ ^(lvm-thin|lvm-snapshot|reflink)/(ext4|xfs)(/[a-z-]+)?$ ]] ||
        refuse "'$drill' is no drill; lvm-thin, lvm-snapshot or reflink, a slash, ext4 or xfs; after another slash a scenario, if it is not source-lost."
    [[ $drill != */*/* || -e playbooks/scenarios/${drill##*/}.yml ]] || refuse "'$drill': playbooks/scenarios has no such scenario."
done

runs=build/vm/runs/$(date -u +%Y%m%d-%H%M%S)
python=build/venv/bin/python
mkdir -p "$runs"
sockets=$(mktemp -d "${TMPDIR:-/tmp}/landfall-XXXXXX")
inside() { vagrant/host run "$@"; }

# What is said goes to the terminal and, without this machine's paths, to a log.
logged() {
    local log=$1 status
    shift
    set +e
    "$@" 2>&1 | sed -u "s#$PWD/##g" | tee -a "$log"
    status=${PIPESTATUS[0]}
    set -e
    [ "$status" = 0 ] || { say "FAILED with status $status: $*; its words are in $log"; return "$status"; }
}

finish() {
    local status=$?
    trap - EXIT
    rm -rf "$sockets"
    if [ "$keep" = yes ]; then
        say "the machines stay (--keep); vagrant/lab down removes them"
    elif [ -x vagrant/lab ] && [ -d build/vm/vagrant-state ]; then
        say "removing the machines"
        vagrant/lab down || status=$?
    fi
    [ "$status" = 0 ] && say "all drills are clean: $drills" || say "NOT clean (status $status); what there is lies in $runs"
    exit "$status"
}

# Shares for anybody on the lab's network, as there is no directory of users; and patience, as an emulated machine on a busy host takes seconds to start a program.
lab_settings='"landfall_lab": true, "landfall_agent_settings": {"smb_guest": true, "nfs_clients": ["10.78.0.0/24"], "nfs_squash": "none"}, "landfall_settings": {"connect_limit_s": 60.0, "silence_limit_s": 20.0}'
# Connections of its own: Ansible keeps them open for a while, and those of another run may lead to a machine that has been restored since.
provision() {
    inside env ANSIBLE_TIMEOUT=180 ANSIBLE_SSH_CONTROL_PATH_DIR="$sockets" build/venv/bin/ansible-playbook --inventory build/vm/inventory.yml \
        playbooks/provision.yml --extra-vars "{\"landfall_substrate\": \"$1\", $lab_settings}"
}

trap finish EXIT
say "packages of this machine, and the virtual environment"
bash packaging/setup.sh --vm
say "box and machines"
vagrant/lab up
say "the wheelhouse for the machines' Python"
bash packaging/wheelhouse.sh --python "$(inside ssh -F build/vm/ssh_config mgmt python3 -c "'import sys; print(\"%d.%d\" % sys.version_info[:2])'")"
# Machines that an earlier run kept go back to where they had not been provisioned yet.
vagrant/lab restore fresh 2>/dev/null || vagrant/lab save fresh

# The volume of a drill that has been looked at makes way for the next one's, which has the same address. Where nothing was salvaged there is no
# open transfer to discard (status 35).
remove_volume() {
    local command
    for command in "unserve $1" "discard $1 --yes || [ \$? = 35 ]" "volume remove $1 --yes"; do
        inside ssh -F build/vm/ssh_config mgmt "sudo landfall $command"
    done
}

provisioned=none twice=no volume=
for drill in $drills; do
    IFS=/ read -r substrate fs scenario <<<"$drill"
    folder=$runs/${drill//\//-}
    mkdir -p "$folder"
    if [ "$substrate" = "$provisioned" ]; then
        say "the volume of the drill before is removed"
        logged "$folder/remove.log" remove_volume "$volume"
    else
        [ "$provisioned" = none ] || { say "back to fresh machines"; vagrant/lab restore fresh; }
        say "provision: $substrate"
        logged "$folder/provision.log" provision "$substrate"
        if [ "$twice" = no ]; then
            say "provision again: nothing may change"
            logged "$folder/provision-again.log" provision "$substrate"
            ! grep -E 'changed=[1-9]' "$folder/provision-again.log" || { say "FAILED: the second run changed something"; exit 1; }
            twice=yes
        fi
        provisioned=$substrate
    fi
    say "drill: $drill"
    logged "$runs/console.log" env COLUMNS=120 "$python" -m mgmt.cli drill --lab vm --substrate "$substrate" --fs "$fs" \
        --scenario "${scenario:-source-lost}" "${at[@]}" --seed "$seed" --out "$folder"
    say "what has no power is switched on again, and all three are looked at"
    vagrant/lab up
    logged "$runs/console.log" inside env LANDFALL_VM_RUN="$folder" "$python" -m pytest -q --timeout 900 tests/vm
    volume=$("$python" -c 'import json, sys; print(json.load(open(sys.argv[1]))["name"])' "$folder/added.json")
done
