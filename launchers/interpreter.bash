# What a launcher does in bash, before ssa_pretrain.launch decides everything else. To be sourced.

export PYTHONSAFEPATH=1  # packages do not come from the folder that a launcher is called from

# Prints the usage of a launcher, which is the comment at its head.
usage() {
    sed -n '2,/^set/s/^# \{0,1\}//p' "$1"
}

# Returns whether an interpreter has the package ssa_pretrain.
has_package() {
    "$1" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("ssa_pretrain") is None)' 2>/dev/null
}

# Sets `python` to the interpreter of --python among the flags of a launcher, else to PYTHON, else to python3, and answers --help. Exits with 3 if the
# interpreter cannot be used, because Python's own message would be a trace, and the shell's only the code 127.
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
            --*) shift ;;  # the next word is its value
            *) break ;;
        esac
        shift || break
    done
    if ! command -v -- "$python" >/dev/null; then
        problem="does not exist or cannot be executed; $remedy"
    elif ! has_package "$python"; then
        problem="has no package ssa_pretrain; $remedy, or pip install -e . into that one"
    fi
    if [[ -n $problem ]]; then
        printf '%s: --python=%s %s\n' "$(basename "$launcher")" "$python" "$problem" >&2
        exit 3
    fi
}
