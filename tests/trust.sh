#!/usr/bin/env bash
# `make trust`: the runs of the README's reliability table that need a GPU, each into a log of its own in $OUT. RUNS says which.
# $LIMIT seconds after the beginning, what still runs is told to stop and says how far it came.
# The first four are small, but `large` takes up to 30 GiB of the GPU: beside 60 other processes it ran out of memory. The others start a
# process a core. Some 9,000 seconds of a core in all, or about 7 minutes on 44 cores; on 16 RUNS="large fuzz sanitize" takes as long, and so does
# RUNS="soak repeats faults check".
set -um # -m: a job in the background hears SIGINT
: "${OUT:=.trust}" "${LIMIT:=480}" "${PYTHON:=python3}" "${RUNS:=large soak repeats faults sanitize fuzz check}"
export FUZZYTOK_TEST_DEVICE=cuda PYTHONPATH=. OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1 TQDM_MININTERVAL=10
mkdir -p "$OUT"
nvidia-smi --query-gpu=name,memory.used,driver_version --format=csv,noheader

run() { # name, command...
  local name=$1 left=$((LIMIT - SECONDS - 15)) status
  [[ " $RUNS " == *" $name "* ]] || return 0
  shift
  [ "$left" -gt 5 ] || { echo "== $name: no time was left" && return 1; }
  timeout --foreground -s INT -k 15 "$left" "$@" >"$OUT/$name.log" 2>&1
  status=$?
  echo "== $name: exit status $status, at $SECONDS s: $(tail -n 1 "$OUT/$name.log")"
  return "$status"
}

test="$PYTHON -m pytest -q -p no:cacheprovider"
jobs=() failed=0
run large $test tests/test_large.py tests/test_launch.py -k "test_large or more_than_2_31" & jobs+=($!)
run soak "$PYTHON" tests/soak.py & jobs+=($!)
run repeats "$PYTHON" tests/repeats.py & jobs+=($!)
run faults $test -n 3 tests/test_faults.py tests/test_races.py tests/test_verify.py & jobs+=($!)
for job in "${jobs[@]}"; do wait "$job" || failed=1; done
run sanitize "$PYTHON" tests/sanitize.py --each 8 || failed=1
run fuzz "$PYTHON" tests/fuzz.py --each 200 || failed=1
run check "$PYTHON" -c 'import sys; from fuzzytok_kernels.cli import main; sys.exit(main(["check", "--all"]))' || failed=1
exit "$failed"
