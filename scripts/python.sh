# Sourced by scripts/install and scripts/lock: finds a Python that p2pfed runs on.

# shellcheck disable=SC2034
python_is_good='import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))'

# Prints its path, or says what to do.
find_python() {
    for name in python3.11 python3 python3.12 python3.13 python; do
        if "$name" -c "$python_is_good" >/dev/null 2>&1; then
            command -v "$name"
            return
        fi
    done
    echo "p2pfed needs Python 3.11 or newer with its venv module" >&2
    echo "found: $(python3 --version 2>/dev/null || echo 'no python3')" >&2
    echo "install it, e.g. on Debian or Ubuntu: apt-get install python3.11 python3.11-venv" >&2
    return 1
}
