#!/usr/bin/env bash
# Makes or completes a virtual environment: finds a Python >= 3.12 and installs this project, editable, with an extra.
#
#   tools/setup_env.sh VENV_DIR [EXTRA]        e.g. tools/setup_env.sh .venv test
#
# PYTHON=/path/to/python chooses the interpreter for a new environment. An environment that is there is completed,
# never rebuilt: packages that already satisfy the requirements (torch above all) stay as they are.
# Called by the Makefile from the repository's root; a plain script because Make and paths with spaces do not mix.
set -euo pipefail

readonly venv=$1 extra=${2:-}
readonly oldest="3.12"

say() { printf '[setup] %s\n' "$*"; }
fail() { printf '[setup] error: %s\n' "$*" >&2; exit 1; }

# Prints the real executable behind a candidate if it is new enough and can make environments. Running it is the only
# sure test: pyenv's shims exist for versions that are not active, and some systems ship Python without ensurepip.
probe() {
    "$@" -c 'import ensurepip, ssl, sys, venv; sys.version_info >= (3, 12) or sys.exit(1); print(sys.executable)' 2>/dev/null
}

find_python() {
    local candidate root
    # 3.12 first: it is the version that the project is developed on.
    for candidate in python3.12 python3.13 python3.14 python3 python; do
        probe "$candidate" && return
    done
    root=${PYENV_ROOT:-$(pyenv root 2>/dev/null || printf '%s/.pyenv' "${HOME:-}")}
    for candidate in "$root"/versions/3.1[2-9]*/bin/python; do
        probe "$candidate" && return
    done
    if command -v uv >/dev/null; then
        candidate=$(uv python find ">=$oldest" 2>/dev/null) && probe "$candidate" && return
    fi
    return 1
}

make_venv() {
    local python
    if [ -n "${PYTHON:-}" ]; then
        python=$(probe "$PYTHON") || fail "PYTHON=$PYTHON is not a Python >= $oldest with the modules venv and ensurepip" \
            "($("$PYTHON" --version 2>&1 || true))"
    else
        python=$(find_python) || fail "no Python >= $oldest found on PATH, under pyenv or through uv" \
            "(python3 is: $(python3 --version 2>&1 || true)). megatron-core 0.19 needs Python $oldest or newer:" \
            "install one (pyenv install $oldest, uv python install $oldest, or your system's python$oldest and" \
            "python$oldest-venv), or name yours: make PYTHON=/path/to/python$oldest"
    fi
    say "making $venv with $("$python" --version) ($python)"
    "$python" -m venv --clear "$venv"
}

# The lines of constraints.txt for packages that the environment does not have yet.
constraints() {
    "$venv/bin/python" - tools/constraints.txt <<'EOF'
import importlib.metadata, pathlib, sys

have = {(d.name or "").lower().replace("_", "-") for d in importlib.metadata.distributions()}
for line in pathlib.Path(sys.argv[1]).read_text("utf-8").splitlines():
    name, is_pin, _ = line.partition("==")
    if is_pin and name.lower().replace("_", "-") not in have:
        print(line)
EOF
}

install() {
    local project=.${extra:+[$extra]}
    constraints >"$venv/constraints.txt"
    if command -v uv >/dev/null; then
        uv pip install --quiet --python "$venv/bin/python" --constraint "$venv/constraints.txt" \
            --editable "$project" && return
        say "uv could not install it (it does not read pip's configuration): trying pip"
    fi
    "$venv/bin/python" -m pip install -qq --disable-pip-version-check --no-input \
        --constraint "$venv/constraints.txt" --editable "$project"
}

# An environment whose interpreter has gone or is too old is made anew; one that works is kept.
if ! probe "$venv/bin/python" >/dev/null; then
    make_venv
fi

if "$venv/bin/python" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)'; then
    say "bringing $venv up to date with setup.py"
else
    say "installing megatron_bdpo${extra:+[$extra]} into $venv (a few minutes the first time: torch brings gigabytes of CUDA libraries)"
fi
SECONDS=0
install || fail "the installation failed, see above; the next make goes on from here"
say "done in ${SECONDS} s: $("$venv/bin/python" -c 'import importlib.metadata as m, sys
print("Python", sys.version.split()[0], *(f"{p} {m.version(p)}" for p in ("torch", "megatron-core")))')"
