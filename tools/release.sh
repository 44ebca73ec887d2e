#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# Make a release of a signed tag: the tarball, its SHA-256 sum, and a signature of that by a key of the user's GnuPG keyring.
# The same tag gives the same tarball, whoever makes it, where and when. See docs/release.rst.
#
#     tools/release.sh TAG [FOLDER]        (default: dist/); QVM_REMOTE_RELEASE_KEY names the key, else it is GnuPG's default one
set -eu
umask 022
LC_ALL=C TZ=UTC
export LC_ALL TZ

fail() {
    echo "release: error: $*" >&2
    exit 1
}

[ $# -eq 1 ] || [ $# -eq 2 ] || fail "use: tools/release.sh TAG [FOLDER]"
tag=$1
cd "$(dirname "$0")/.."
folder=${2:-dist}
# A name that has no option in it, and no other commit than the one that was signed.
case $tag in v[0-9]*) ;; *) fail "a tag is v and a version, for example v2.0.0" ;; esac
git rev-parse -q --verify "refs/tags/$tag^{commit}" >/dev/null || fail "there is no tag $tag"
git verify-tag "$tag" 2>/dev/null || fail "the tag $tag has no signature that can be checked here; make it with: git tag -s $tag"

version=${tag#v}
[ "$(git show "refs/tags/$tag:_utils/pullrpc/__init__.py" | sed -n 's/^__version__ = "\(.*\)"$/\1/p')" = "$version" ] || fail "the program in $tag has another version"

name=qvm-remote-formula-$version
mkdir -p "$folder"
for made in "$name.tar.gz" SHA256SUMS SHA256SUMS.asc; do
    [ ! -e "$folder/$made" ] || fail "$folder/$made is there already; remove it, or name another folder"
done
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# Nothing of the user's settings gets in: no attributes, no umask, no filter; gzip writes no name and no time.
git -c tar.umask=0022 -c core.attributesFile=/dev/null -c core.autocrlf=false archive --format=tar --prefix="$name/" "refs/tags/$tag" >"$scratch/$name.tar"
gzip -9 -n -c "$scratch/$name.tar" >"$scratch/$name.tar.gz"
(
    cd "$scratch"
    # Another gzip may compress in another way; what is in it is the same.
    echo "# unpacked: $(sha256sum "$name.tar")"
    sha256sum "$name.tar.gz"
) >"$scratch/SHA256SUMS"

if [ -n "${QVM_REMOTE_RELEASE_KEY:-}" ]; then
    set -- --local-user "$QVM_REMOTE_RELEASE_KEY"
else
    set --
fi
gpg --batch --yes --armor --detach-sign --digest-algo SHA512 "$@" --output "$scratch/SHA256SUMS.asc" "$scratch/SHA256SUMS" || fail "GnuPG could not sign; is the key in your keyring (QVM_REMOTE_RELEASE_KEY)?"
gpg --batch --verify "$scratch/SHA256SUMS.asc" "$scratch/SHA256SUMS" 2>/dev/null || fail "GnuPG does not verify the signature that it made"
mv "$scratch/$name.tar.gz" "$scratch/SHA256SUMS" "$scratch/SHA256SUMS.asc" "$folder/"
cat "$folder/SHA256SUMS"
echo "signed: $folder/SHA256SUMS.asc"
