# For launchers: what bash has to do before ssa_pretrain.launch can decide the rest. To be sourced.

export PYTHONSAFEPATH=1  # the folder that a launcher is called from is not a place for packages

# Prints a launcher's usage, the comment at its head.
usage() {
    sed -n '2,/^set/s/^# \{0,1\}//p' "$1"
}

# Sets `python` to the interpreter of --python among a launcher's flags, of PYTHON, or to python3. Answers --help. Exits with 3 where the interpreter will
# not do: its own words would be a trace, and the shell's a bare 127.
#
#   find_interpreter LAUNCHER [FLAGS ...]
find_interpreter() {
    local launcher=$1 remedy="try --python=.venv/bin/python, which make quickstart builds" problem=
    python=${PYTHON:-python3}
    shift
    while (($#)); do
        case $1 in
            -h | --help) usage "$launcher" && exit 0 ;;
            --python=?*) python=${1#*=} ;;
            --python) python=${2:-$python} && shift ;;
            --) break ;;
            --*=* | --dry-run | --dry_run) ;;
            --*) shift ;;  # its value is the next word
            *) break ;;
        esac
        shift || break
    done
    if ! command -v -- "$python" >/dev/null; then
        problem="is not there or cannot be run; $remedy"
    elif ! "$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("ssa_pretrain") is None)' 2>/dev/null; then
        problem="has no package ssa_pretrain; $remedy, or pip install -e . into that one"
    fi
    if [[ -n $problem ]]; then
        printf '%s: --python=%s %s\n' "$(basename "$launcher")" "$python" "$problem" >&2
        exit 3
    fi
}
