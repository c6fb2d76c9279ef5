"""completion: the script that asks `p2pfed __complete` what may stand at the cursor.

The scripts know nothing themselves: they pass the words up to the cursor, and offer the lines that
come back. A line `:files` or `:folders` leaves it to the shell. What is offered is decided in
`complete`.
"""

from __future__ import annotations

from p2pfed.cli.options import describe

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace

__all__ = ["SCRIPTS", "completion"]

_BASH = r"""# p2pfed completion for bash: eval "$(p2pfed completion bash)"
_p2pfed() {
    local line program="${COMP_WORDS[0]/#\~/$HOME}"
    COMPREPLY=()
    while IFS= read -r line; do
        case $line in
            :files) compopt -o default 2>/dev/null ;;
            :folders) compopt -o dirnames 2>/dev/null ;;
            *=) compopt -o nospace 2>/dev/null; COMPREPLY+=("$line") ;;
            ?*) COMPREPLY+=("$(printf %q "$line")") ;;
        esac
    done < <("$program" __complete bash "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null)
}
complete -F _p2pfed p2pfed
"""

_ZSH = r"""#compdef p2pfed
# p2pfed completion for zsh: as _p2pfed in a folder of $fpath, or sourced after compinit
_p2pfed() {
    local line
    local -a found open
    for line in "${(@f)$("${words[1]}" __complete zsh "${(@Q)words[2,CURRENT]}" 2>/dev/null)}"; do
        case $line in
            :files) _files ;;
            :folders) _files -/ ;;
            *=) open+=("$line") ;;
            ?*) found+=("$line") ;;
        esac
    done
    (( $#found )) && compadd -a found
    (( $#open )) && compadd -S '' -a open
    return 0
}
if [ "$funcstack[1]" = "_p2pfed" ]; then
    _p2pfed "$@"
else
    compdef _p2pfed p2pfed
fi
"""

_FISH = r"""# p2pfed completion for fish: ~/.config/fish/completions/p2pfed.fish
function __p2pfed_complete
    set -l before (commandline -opc)
    set -l current (commandline -ct)
    for line in ($before[1] __complete fish $before[2..-1] "$current" 2>/dev/null)
        switch $line
            case :files
                __fish_complete_path "$current"
            case :folders
                __fish_complete_directories "$current"
            case '*'
                echo $line
        end
    end
end
complete -c p2pfed -f -a '(__p2pfed_complete)'
"""

SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}


def completion(parser: ArgumentParser) -> None:
    """Fill in the command `completion`."""
    describe(
        parser,
        "Print a script that completes commands, options, names of peers and tasks, and files:\n"
        '  bash  eval "$(p2pfed completion bash)"   in ~/.bashrc\n'
        "  zsh   p2pfed completion zsh > a folder of $fpath, as _p2pfed\n"
        "  fish  p2pfed completion fish > ~/.config/fish/completions/p2pfed.fish\n"
        "Peers are asked of the daemon's socket, for 300 ms at most.",
        endpoint="GET /v1/peers, when a peer's name is completed",
    )
    parser.add_argument("shell", choices=tuple(SCRIPTS))
    parser.set_defaults(run=_completion)


def _completion(args: Namespace) -> None:
    print(SCRIPTS[args.shell], end="")
