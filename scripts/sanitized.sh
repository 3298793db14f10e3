#!/bin/sh
# Runs a command over modules that were built by make QTFS_SANITIZE=1, and fails if a sanitizer had anything to say.
#
#   sanitized.sh COMMAND...
#
# The sanitizers' library has to come first in every Python process, so LD_PRELOAD puts it into all processes; what it
# finds in others than Python is not ours. Reports go to files, as a daemon has no terminal, and are printed at the end.
set -u
root=$(CDPATH='' cd -- "$(dirname -- "$(readlink -f -- "$0")")/.." && pwd)
reports=$(mktemp -d "${TMPDIR:-/tmp}/qtfs-sanitize.XXXXXX")
trap 'rm -rf "$reports"' EXIT
chmod 1777 "$reports" # some tests run programs as other users
python=$(readlink -f "$root/.venv/bin/python")

# By the name that a process was started under.
for name in python python3 "$(basename "$python")"; do
    cat >"$reports/options.$name" <<EOF
halt_on_error=1 exitcode=99 detect_leaks=1 handle_sigbus=0 new_delete_type_mismatch=1 alloc_dealloc_mismatch=1 malloc_context_size=2 log_path=$reports/report
EOF
    chmod 644 "$reports/options.$name"
done
lenient=halt_on_error=0:exitcode=0:detect_leaks=0:new_delete_type_mismatch=0:alloc_dealloc_mismatch=0
export LD_PRELOAD="$(gcc -print-file-name=libasan.so)"
export ASAN_OPTIONS="$lenient:log_path=$reports/foreign:allocator_may_return_null=1:include_if_exists=$reports/options.%b"
export UBSAN_OPTIONS="print_stacktrace=1:log_path=$reports/report"
export LSAN_OPTIONS="suppressions=$root/scripts/sanitized.supp:print_suppressions=0"

"$@"
status=$?
unset LD_PRELOAD
# A thread that ended while the leak sanitizer stopped all of them is no finding.
found=$(find "$reports" -name 'report*' -exec grep -lv 'Unable to get registers from thread' {} + | wc -l)
find "$reports" -name 'report*' -exec cat {} +
echo "sanitizers: $found reports"
[ "$found" = 0 ] && exit "$status"
exit 1
