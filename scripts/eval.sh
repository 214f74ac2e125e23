#!/usr/bin/env bash
# The paper's table: the four benchmarks at each retain ratio, by lmms-eval, with the settings published for each.
#
#     scripts/eval.sh [--dry-run] CHECKPOINT OUTPUT [RETAIN ...]      RETAIN: 1 0.25 0.2 0.15 0.1 unless given
#
# A run for each benchmark and ratio (1: the unpruned model), its results in OUTPUT/BENCHMARK/RETAIN; one whose results
# are there is not made again. Then the table. The settings themselves are in earlytom/presets.py; merging inside the
# LLM is done as in the code that made the published figures (docs/method.md, quirk 3).
#
#     BENCHMARKS   of: mvbench egoschema longvideobench videomme (default all)
#     PROCESSES    on as many cards (default 1)
#     BATCH        questions that the language model answers at once (default 1)
#     MODEL_ARGS   more of them for each run, such as dtype=fp16
#     LIMIT        only the first questions of each task, to try whether all is in place
#
# Needs the environment of docs/evaluation.md, and the data sets: lmms-eval fetches them from the hub.
set -euo pipefail

dry=false
if [[ "${1:-}" == --dry-run ]]; then
  dry=true
  shift
fi
if (($# < 2)); then
  echo "usage: scripts/eval.sh [--dry-run] CHECKPOINT OUTPUT [RETAIN ...]" >&2
  exit 2
fi
checkpoint=$1 output=$2
shift 2
if [[ "$checkpoint$output" == *,* ]]; then
  echo "eval.sh: a comma in $checkpoint or $output: lmms-eval takes what follows for another argument, rename it" >&2
  exit 2
fi
ratios=("$@")
(($#)) || ratios=(1 0.25 0.2 0.15 0.1)
read -ra benchmarks <<<"${BENCHMARKS:-mvbench egoschema longvideobench videomme}"

task_of() {
  case $1 in
    mvbench | videomme) echo "$1" ;;
    egoschema) echo egoschema_subset ;; # its answers are public; those of all questions are not
    longvideobench) echo longvideobench_val_v ;;
    *)
      echo "eval.sh: there is no benchmark $1: mvbench, egoschema, longvideobench, videomme" >&2
      return 1
      ;;
  esac
}

has_results() {
  compgen -G "$1/*_results.json" >/dev/null || compgen -G "$1/*/*_results.json" >/dev/null
}

launcher=(python -m lmms_eval)
if ((${PROCESSES:-1} > 1)); then
  launcher=(accelerate launch --num_processes "$PROCESSES" -m lmms_eval)
fi

for benchmark in "${benchmarks[@]}"; do
  task=$(task_of "$benchmark")
  for retain in "${ratios[@]}"; do
    arguments="checkpoint=$checkpoint,retain=$retain"
    [[ "$retain" =~ ^1(\.0*)?$ ]] || arguments+=",preset=$benchmark,inner=as-released"
    arguments+="${MODEL_ARGS:+,$MODEL_ARGS}"
    results="$output/$benchmark/$retain"
    command=("${launcher[@]}" --model earlytom --model_args "$arguments" --tasks "$task" --force_simple
      --batch_size "${BATCH:-1}" --log_samples --output_path "$results")
    [[ -z "${LIMIT:-}" ]] || command+=(--limit "$LIMIT")
    if $dry; then
      echo "${command[*]}"
      continue
    fi
    if has_results "$results"; then
      echo "eval.sh: $results is there already"
      continue
    fi
    "${command[@]}"
    if ! has_results "$results"; then # lmms-eval exits with 0 after an error as well
      echo "eval.sh: no results of $benchmark at $retain: see what lmms-eval said above" >&2
      exit 1
    fi
  done
done
$dry || earlytom-eval --table "$output"
