#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# Bring qvm-remote from a qube into dom0, and set it up for that qube. In dom0, as root: sh install-dom0.sh VM [PATH]
#
# What comes from the qube is hostile until its digest was shown and accepted: before that it is bounded and given to
# sha256sum, and nothing else is done with it. Afterwards all names, kinds and sizes in it are checked before it is unpacked.
set -eu
LC_ALL=C
export LC_ALL
umask 022

# Most bytes that are taken, before and after unpacking; longest that the qube may take, seconds; most files.
max_bytes=16777216 max_seconds=300 max_files=2000
base=/srv/formulas/base
formula=$base/qvm-remote-formula
roots=/etc/salt/minion.d/qvm-remote.conf
pillar=/srv/pillar/qvm-remote
parts="_engines _modules _states _utils client dom0 qvm-remote-formula FORMULA LICENSE README.rst pillar.example install-dom0.sh"

usage() {
    cat <<END
usage: sh install-dom0.sh [--digest HEX] VM [PATH]

Fetches qvm-remote from VM, shows its SHA-256 digest, asks, installs it in dom0, and applies the formula for VM. A second
run upgrades. PATH in VM (default: qvm-remote-formula, in the home folder) is a folder with the source tree, a .tar of it
(not compressed, made in that folder: tar -cf FILE --exclude=__pycache__ $parts),
or the package qvm-remote-formula as an .rpm.

  --digest HEX   do not ask: take what has this digest, and nothing else
  --help
END
}

fail() {
    printf 'install-dom0.sh: error: %s\n' "$*" >&2
    exit 1
}

wrong() {
    printf 'install-dom0.sh: error: %s; --help shows how\n' "$*" >&2
    exit 2
}

ask() {
    [ -n "$digest" ] && return
    [ -t 0 ] || fail "nobody is there to be asked; a script says: --digest HEX"
    printf '%s Type yes: ' "$1"
    answer=
    read -r answer || :
    [ "$answer" = yes ] || fail "not accepted; nothing was changed"
}

digest='' vm='' path=''
while [ $# -gt 0 ]; do
    case $1 in
    --help | -h)
        usage
        exit 0
        ;;
    --digest)
        [ $# -ge 2 ] || wrong "--digest needs a SHA-256 digest"
        digest=$(printf '%s' "$2" | tr A-F a-f)
        shift
        ;;
    -*) wrong "no such option: $(printf '%s' "$1" | tr -cd ' -~')" ;;
    *)
        if [ -z "$vm" ]; then
            vm=$1
        elif [ -z "$path" ]; then
            path=$1
        else
            wrong "one VM and one PATH"
        fi
        ;;
    esac
    shift
done
path=${path:-qvm-remote-formula}
[ -n "$vm" ] || wrong "say from which VM"
case $vm in [!A-Za-z]* | *[!A-Za-z0-9_.-]* | ????????????????????????????????*) wrong "not a VM's name: a letter, then at most 30 letters, digits, _ . -" ;; esac
# It becomes part of a command line in the qube, and is shown here.
case $path in -* | *[!A-Za-z0-9_./+-]*) wrong "PATH may have letters, digits, and _ . / + -" ;; esac
case $digest in '') ;; *[!0-9a-f]*) wrong "--digest needs 64 hex digits" ;; *) [ ${#digest} -eq 64 ] || wrong "--digest needs 64 hex digits" ;; esac
[ "$(id -u)" -eq 0 ] || fail "only root may do that; type: sudo sh install-dom0.sh $vm"
for program in qvm-run qvm-check qubesctl sha256sum tar timeout awk; do
    command -v "$program" >/dev/null || fail "there is no $program here; this is for dom0 of Qubes OS"
done
qvm-check --quiet --running -- "$vm" >/dev/null 2>&1 || fail "$vm does not run; start it first"
if [ -e "$roots" ] && ! { grep -qF -- "- $formula/qvm-remote-formula" "$roots" && grep -qx -- " *- $formula" "$roots"; }; then
    fail "$roots does not name $formula and $formula/qvm-remote-formula as file roots; mend or remove it"
fi
[ ! -L "$formula" ] || fail "$formula is a symbolic link; move it away"

temp=$(mktemp -d)
new='' old=''
stop_fetching() {
    if [ -s "$temp/fetching" ]; then
        kill "$(cat "$temp/fetching")" 2>/dev/null || :
        rm "$temp/fetching"
    fi
}
clean_up() {
    stop_fetching
    if [ -n "$old" ] && [ -e "$old" ] && [ ! -e "$formula" ]; then
        mv -T -- "$old" "$formula"
    fi
    rm -rf -- "$temp" ${new:+"$new"} ${old:+"$old"}
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# The same files always give the same bytes, so that the digest can be compared with what another qube computes of them.
pack="tar --create --format=ustar --sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner --mode=u=rwX,go=rX --exclude=__pycache__ $parts"
case $path in
*.rpm | *.tar) fetch="cat $path" ;;
*) fetch="cd $path && $pack" ;;
esac
printf 'Fetching %s from %s...\n' "$path" "$vm"
# What the qube writes to stderr is not to reach this terminal. Beside us, so that Ctrl-C ends it whatever the qube does.
{
    timeout "$max_seconds" qvm-run --pass-io --no-gui --no-autostart -- "$vm" "$fetch" </dev/null &
    echo $! >"$temp/fetching"
    code=0
    wait $! || code=$?
    echo "$code" >"$temp/code"
} 2>/dev/null | head -c $((max_bytes + 1)) >"$temp/came" &
wait $!
stop_fetching
size=$(wc -c <"$temp/came")
[ "$size" -le $max_bytes ] || fail "$vm sent more than $max_bytes bytes; that is not qvm-remote, and was thrown away"
{ [ "$(cat "$temp/code" 2>/dev/null)" = 0 ] && [ "$size" -gt 0 ]; } || fail "$vm could not send $path; is it there, as that user's? (in $vm: ls -l $path)"
came=$(sha256sum <"$temp/came")
came=${came%% *}
printf '\n  %s bytes, SHA-256\n  %s\n\n' "$size" "$came"
if [ -n "$digest" ]; then
    [ "$came" = "$digest" ] || fail "this is not what --digest says; nothing of it was looked at, and nothing was changed"
else
    case $path in
    *.rpm | *.tar) printf 'The same, computed where you trust it: sha256sum %s\n' "$path" ;;
    *) printf 'The same, computed where you trust it:\n  (cd %s && %s) | sha256sum\n' "$path" "$pack" ;;
    esac
    printf 'Whatever has this digest is going to be root in dom0.\n'
    ask "Is it the one that you expect?"
fi

install_rpm() {
    command -v rpm >/dev/null || fail "there is no rpm here"
    mv "$temp/came" "$temp/came.rpm"
    [ "$(rpm --query --package --queryformat '%{NAME}' "$temp/came.rpm" 2>/dev/null)" = qvm-remote-formula ] || fail "this is not the package qvm-remote-formula"
    rpm --query --package --list "$temp/came.rpm" 2>/dev/null | tr -cd '\n -~'
    ask "Install this package?"
    rpm --upgrade --replacepkgs "$temp/came.rpm" || fail "rpm could not install it"
}

# From stdin: a file that it opens itself tar would unpack, whatever that makes of it.
listing() {
    tar --list --absolute-names --quoting-style=escape --numeric-owner "$@" --file=- <"$temp/came" 2>/dev/null ||
        fail "this is no tar archive, or a compressed one; nothing of it was unpacked"
}

check_names() {
    listing >"$temp/names"
    [ "$(wc -l <"$temp/names")" -le $max_files ] || fail "there are more than $max_files files in it; nothing of it was unpacked"
    name='[A-Za-z0-9_][A-Za-z0-9_.-]*'
    # Salt would load code from a __pycache__ as well, and of what is compiled a digest tells nobody anything.
    bad=$(grep -E '(^|/)__pycache__(/|$)|\.(so|py[cod])$' "$temp/names" | head -n 1 | cut -c 1-80 | tr -cd ' -~')
    [ -z "$bad" ] || fail "there is compiled code in it, which qvm-remote has not: $bad; nothing of it was unpacked"
    allowed="(_engines|_modules|_states|_utils|client|dom0|qvm-remote-formula)(/$name)*/?|FORMULA|LICENSE|README\\.rst|pillar\\.example|install-dom0\\.sh"
    bad=$(grep -vxE "$allowed" "$temp/names" | head -n 1 | cut -c 1-80 | tr -cd ' -~')
    [ -z "$bad" ] || fail "there is a name in it that qvm-remote has not: $bad; nothing of it was unpacked"
    [ -z "$(sort "$temp/names" | uniq -d)" ] || fail "there is a name twice in it; nothing of it was unpacked"
    for needed in _modules/qvm_remote.py _utils/pullrpc/__init__.py qvm-remote-formula/qvm-remote/init.sls; do
        grep -qx "$needed" "$temp/names" || fail "it has no $needed: is that the source tree of qvm-remote? nothing of it was unpacked"
    done
}

check_kinds() {
    listing --verbose >"$temp/kinds"
    # Of a sparse file, what it grows to.
    bad=$(awk -v max=$max_bytes '!/^[-d]/ { bad = "a link or a device" } /^-/ { sum += $3 } END { if (sum > max) bad = "too much"; print bad }' "$temp/kinds")
    [ -z "$bad" ] || fail "there is $bad in it; nothing of it was unpacked"
}

digests() {
    (cd "$1" && find . -type f -printf '%P\n' | sort | tr '\n' '\0' | xargs -0 sha256sum --)
}

install_tree() {
    ! rpm --query qvm-remote-formula >/dev/null 2>&1 || fail "the package qvm-remote-formula is installed here; upgrade it by its .rpm, or remove it first"
    check_names
    check_kinds
    mkdir -p "$base"
    # Beside its place, to be renamed; what an earlier run left when it was killed goes.
    rm -rf "$base"/.qvm-remote-formula.*
    new=$(mktemp -d "$base/.qvm-remote-formula.XXXXXX")
    tar --extract --no-same-owner --no-same-permissions --touch --keep-old-files --directory="$new" --file=- <"$temp/came" || fail "it could not be unpacked"
    chmod -R u=rwX,go=rX "$new"
    [ -z "$(find "$new" ! -type f ! -type d)" ] || fail "there is more than files and folders in it"
    digests "$new" >"$temp/digests"
    if [ -d "$formula" ] && [ "$(digests "$formula")" = "$(cat "$temp/digests")" ]; then
        printf 'The same files are installed in %s.\n' "$formula"
        return
    fi
    cat "$temp/digests"
    ask "Install these $(wc -l <"$temp/digests") files in $formula?"
    if [ -e "$formula" ]; then
        old=$(mktemp -d -u "$base/.qvm-remote-formula.XXXXXX")
        mv -T -- "$formula" "$old"
    fi
    mv -T -- "$new" "$formula"
}

case $path in
*.rpm) install_rpm ;;
*) install_tree ;;
esac

if [ ! -e "$roots" ]; then
    mkdir -p "${roots%/*}"
    printf 'file_roots:\n  base:\n    - /srv/salt\n    - %s\n    - %s/qvm-remote-formula\n' "$formula" "$formula" >"$temp/roots"
    mv "$temp/roots" "$roots"
    chmod 0644 "$roots"
fi
printf '\nGiving Salt the modules...\n'
# For 20 seconds Salt believes a list of files that it made.
rm -f /var/cache/salt/minion/file_lists/roots/*.p
qubesctl saltutil.sync_all refresh=true >/dev/null || fail "Salt could not take the modules; type: qubesctl saltutil.sync_all refresh=true"

# What pillar says of the qube: named, other (it speaks of others), none (of nobody yet), or what is wrong with it.
planned() {
    qubesctl qvm_remote.plan --out=json 2>/dev/null | python3 -c '
import json, sys
plan = json.load(sys.stdin)["local"]
vm = plan.get("vms", {}).get(sys.argv[1])
print(plan.get("problem") or ("named" if vm and vm["state"] == "present" else "other" if plan["vms"] or plan["templates"] else "none"))
' "$vm"
}

plan=$(planned) || fail "Salt can't say what pillar wants; type: qubesctl qvm_remote.plan"
case $plan in none | "dom0's pillar has no qvm-remote"*) missing=1 ;; *) missing= ;; esac
if [ "$missing" ] && [ ! -e "$pillar.sls" ]; then
    # A standalone has no template, and gets the client itself.
    template=$(qvm-prefs -- "$vm" template 2>/dev/null) || template=
    case $template in '' | None | [!A-Za-z]* | *[!A-Za-z0-9_.-]*) template=$vm ;; esac
    mkdir -p "${pillar%/*}"
    printf 'qvm-remote:\n  client:\n    templates: ["%s"]\n  vms:\n    "%s": {}\n' "$template" "$vm" >"$pillar.sls"
    chmod 0600 "$pillar.sls"
    printf '# Gives dom0, and nobody else, its pillar.\nbase:\n  dom0:\n    - qvm-remote\n' >"$pillar.top"
    printf 'Pillar is in %s.sls; pillar.example documents all of it.\n' "$pillar"
    qubesctl top.enable qvm-remote pillar=True >/dev/null || fail "the top file $pillar.top can't be enabled; type: qubesctl top.enable qvm-remote pillar=True"
    plan=$(planned) || plan='Salt can not say what pillar wants'
fi
case $plan in
named) ;;
none | other) fail "the files are installed, but pillar does not name $vm: write under qvm-remote: vms: $vm: {} and type: qubesctl state.apply qvm-remote" ;;
*) fail "the files are installed, but $plan" ;;
esac
printf 'Applying the formula...\n\n'
qubesctl state.apply qvm-remote --retcode-passthrough || fail "the files are installed, but not all of the formula could be applied; see above, then type: qubesctl state.apply qvm-remote"
printf '\nDone. Restart the qubes of the template that got the client, %s too; then, in %s: qvm-remote hostname. In dom0: sudo qvm-remote-dom0 doctor\n' "$vm" "$vm"
