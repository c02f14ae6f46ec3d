#!/bin/sh
# cc, for tests whose HAORI_HOME is always new: what it made of the same files with the same options is kept in
# $HAORI_TESTS_COMPILED and taken from there. Called as native_code.py does: OPTION... -o OUT SOURCE.
set -e
options= out= previous=
for word in "$@"; do
    case $previous in
    -o) out=$word ;;
    *) [ "$word" = -o ] || options="$options $word" ;;
    esac
    previous=$word
    last=$word
done
key=$({ cc --version; echo "$options"; cat "$last" "$(dirname "$0")"/../src/haori/core/*.h; } | sha256sum | cut -c1-32)
kept=$HAORI_TESTS_COMPILED/$key.so
if [ ! -f "$kept" ]; then
    cc "$@"
    mkdir -p "$HAORI_TESTS_COMPILED"
    cp "$out" "$kept.$$"
    mv "$kept.$$" "$kept"
else
    cp "$kept" "$out"
fi
