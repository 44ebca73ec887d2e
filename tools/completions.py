# SPDX-License-Identifier: GPL-2.0-or-later
"""Completion for bash, zsh and fish, made of a program's words.

Each is a table of what may follow a command, and one walk along the command line that finds out where in it the cursor is. What a qube or
dom0 is asked for (names, ids) is compared with what such a name can be before it is offered: the shell must never read it.
"""

from words import KEPT, OTHER, OWN, REST, VM, WAITING

_HEAD = "# SPDX-License-Identifier: GPL-2.0-or-later\n# Completion of {name} for {shell}. Made by tools/papers.py; do not edit.\n"
#: What a name may be; the id of a command, the name of a qube.
_ID, _NAME = "^[0-9]{8}-[0-9]{6}-[0-9]{1,10}-[0-9a-f]{8}$", "^[A-Za-z][A-Za-z0-9_.-]*$"

_BASH = r"""
# The options that may follow a command, those of them that take a value, words that go on with it, and its arguments' kinds.
@FUNCTION@_knows() {
    valued='' next='' kinds=''
    case $1 in
@TABLE@
    esac
}

@FUNCTION@_values() {
    local name
    # It runs in a shell of its own.
    shopt -u failglob
    case $1 in
@VALUES@
    esac
}

@FUNCTION@() {
    local cur=${COMP_WORDS[COMP_CWORD]} command='' alone='@ALONE@' options valued next kinds skip=0 taken=0 i word
    local -a found words
    COMPREPLY=()
    # The name of a file, whatever stands before it. Bash cuts there.
    if [[ ${COMP_WORDS[COMP_CWORD - 1]} == [\<\>\&]* ]]; then
        compopt -o default
        return
    fi
    @FUNCTION@_knows ''
    for ((i = 1; i < COMP_CWORD; i++)); do
        word=${COMP_WORDS[i]}
        if [[ $word == = ]]; then
            # Bash has --option=value as three words.
            skip=1
        elif ((skip)); then
            skip=0
        elif [[ $word == -- ]]; then
            return
        elif [[ $word == -* ]]; then
            [[ " $valued " == *" $word "* ]] && skip=1
            [[ -z $command && " $alone " == *" $word "* ]] && next=''
        elif [[ " $next " == *" $word "* ]]; then
            command=${command:+$command }$word
            @FUNCTION@_knows "$command"
        else
            ((taken += 1))
            next=''
        fi
    done
    # A value; or what follows is no command line of ours.
    if ((skip)) || [[ $cur == = ]] || { ((taken)) && [[ -z $command || $kinds == *rest ]]; }; then
        return
    fi
    if [[ $cur == -* ]]; then
        read -ra words <<<"$options"
    else
        read -ra found <<<"$kinds"
        read -ra words <<<"$next"
        mapfile -t found < <(@FUNCTION@_values "${found[taken]-}")
        words+=("${found[@]}")
    fi
    # Not compgen -W, which expands what it is given.
    for word in "${words[@]}"; do
        [[ $word == "$cur"* ]] && COMPREPLY+=("$word")
    done
}

complete -F @FUNCTION@ @NAME@
"""
_BASH_VALUES = {
    KEPT: (
        "for name in ~/.qvm-remote/history/*/*; do",
        f"    [[ ${{name##*/}} =~ {_ID} ]] && printf '%s\\n' \"${{name##*/}}\"",
        "done",
    ),
    WAITING: (
        "for name in ~/.qvm-remote/queue/{pending,running}/*; do",
        f"    [[ ${{name##*/}} =~ {_ID} ]] && printf '%s\\n' \"${{name##*/}}\"",
        "done",
    ),
    VM: (
        "while read -r name; do",
        f"    [[ $name =~ {_NAME} && $name != dom0 ]] && printf '%s\\n' \"$name\"",
        "done < <(qvm-ls --raw-list 2>/dev/null)",
    ),
}

_ZSH = r"""
# The options that may follow a command, those of them that take a value, words that go on with it, and its arguments' kinds.
@FUNCTION@_knows() {
    valued=() next=() kinds=()
    case $1 in
@TABLE@
    esac
}

@FUNCTION@() {
    local command='' word kind name
    local -i skip=0 taken=0 ret=1 i
    local -a alone common flags valued next kinds found
    alone=(@ALONE@)
    common=(
@COMMON@
    )
    @FUNCTION@_knows ''
    for ((i = 2; i < CURRENT; i++)); do
        word=$words[i]
        if ((skip)); then
            skip=0
        elif [[ $word == -- ]]; then
            return 1
        elif [[ $word == -* ]]; then
            (($valued[(Ie)$word])) && skip=1
            [[ -z $command ]] && (($alone[(Ie)$word])) && next=()
        elif [[ -n ${(M)next:#$word:*} ]]; then
            command=${command:+$command }$word
            @FUNCTION@_knows "$command"
        else
            ((taken += 1))
            next=()
        fi
    done
    # A value; or what follows is no command line of ours.
    if ((skip)) || { ((taken)) && [[ -z $command || $kinds[-1] == rest ]]; }; then
        return 1
    fi
    if [[ $PREFIX == -* ]]; then
        _describe -o -t options option flags
        return
    fi
    kind=$kinds[taken+1]
    case $kind in
@VALUES@
    esac
    (($#next)) && _describe -t commands command next && ret=0
    (($#found)) && compadd -a found && ret=0
    return ret
}

@FUNCTION@ "$@"
"""
_ZSH_VALUES = {
    KEPT: (
        "for name in ~/.qvm-remote/history/*/*(N:t); do",
        f"    [[ $name =~ '{_ID}' ]] && found+=($name)",
        "done",
    ),
    WAITING: (
        "for name in ~/.qvm-remote/queue/{pending,running}/*(N:t); do",
        f"    [[ $name =~ '{_ID}' ]] && found+=($name)",
        "done",
    ),
    VM: (
        'for name in ${(f)"$(qvm-ls --raw-list 2>/dev/null)"}; do',
        f"    [[ $name =~ '{_NAME}' && $name != dom0 ]] && found+=($name)",
        "done",
    ),
}

_FISH = r"""
# Says whether the command line so far is a command ($argv[1]; '*': any) and so many arguments ($argv[2]; -1: any number).
function @FUNCTION@_at
    set -l alone @ALONE@
    set -l commands @COMMANDS@
    set -l valued @VALUED@
    set -l command ''
    set -l skip 0
    set -l taken 0
    set -l is_open 1
    set -l words (commandline -opc)
    for word in $words[2..-1]
        if test $skip = 1
            set skip 0
        else if test "$word" = --
            return 1
        else if string match -q -- '-*' "$word"
            if contains -- "$command $word" $valued
                set skip 1
            end
            if test -z "$command"; and contains -- "$word" $alone
                set is_open 0
            end
        else if test $is_open = 1; and contains -- (string trim -- "$command $word") $commands
            set command (string trim -- "$command $word")
        else
            set taken (math $taken + 1)
            set is_open 0
        end
    end
    test $skip = 0; or return 1
    if test "$argv[1]" = '*'
        test -n "$command"
        return
    end
    test "$command" = "$argv[1]"; or return 1
    if test $argv[2] = next
        test $is_open = 1
    else
        test $argv[2] = -1; or test $taken = $argv[2]
    end
end

function @FUNCTION@_values
    switch $argv[1]
@VALUES@
    end
end

complete -c @NAME@ -f
@TABLE@
"""
_FISH_VALUES = {
    # Only set takes a pattern that fits nothing.
    KEPT: ("set -l names ~/.qvm-remote/history/*/*", f"printf '%s\\n' $names | string replace -r '.*/' '' | string match -r -- '{_ID}'"),
    WAITING: ("set -l names ~/.qvm-remote/queue/{pending,running}/*", f"printf '%s\\n' $names | string replace -r '.*/' '' | string match -r -- '{_ID}'"),
    VM: (f"qvm-ls --raw-list 2>/dev/null | string match -r -- '{_NAME}' | string match -v -- dom0",),
}


def bash(program):
    """Completion for bash.

    Args:
        program: words.Program.

    Returns:
        str
    """
    rows = []
    for words, (options, arguments, following) in program.beginnings().items():
        values = {"options": _flags(options), "valued": _valued(options), "next": [word for word, _ in following], "kinds": _kinds(arguments)}
        rows += [f"    '{' '.join(words)}')", *(f"        {name}='{' '.join(found)}'" for name, found in values.items() if found), "        ;;"]
    own = f"printf '%s\\n' {' '.join(_own(program))}"
    values = _cases(program, {**_BASH_VALUES, OWN: (own,)}, "    {})", "        {}", "        ;;")
    return _filled(_BASH, "bash", program, TABLE=rows, VALUES=values, ALONE=[" ".join(program.alone)])


def zsh(program):
    """Completion for zsh.

    Args:
        program: words.Program.

    Returns:
        str
    """
    rows, common = [], program.commands[0].common
    for words, (options, arguments, following) in program.beginnings().items():
        rows.append(f"    '{' '.join(words)}')")
        own = [option for option in options if not words or option not in common]
        rows += ["        flags=(", *_zsh_flags(own, 12), *(["            $common"] if words else []), "        )"]
        rows += [f"        valued=({' '.join(_valued(options))})"] if _valued(options) else []
        if following:
            rows += ["        next=(", *(f"            {_quoted(f'{word}:{text}')}" for word, text in following), "        )"]
        rows += [f"        kinds=({' '.join(_kinds(arguments))})"] if arguments else []
        rows.append("        ;;")
    values = _cases(program, {**_ZSH_VALUES, OWN: (f"found=({' '.join(_own(program))})",)}, "    {})", "        {}", "        ;;")
    return f"#compdef {program.name}\n" + _filled(_ZSH, "zsh", program, TABLE=rows, VALUES=values, ALONE=[" ".join(program.alone)], COMMON=_zsh_flags(common, 8))


def _zsh_flags(options, indent):
    return [f"{'':{indent}}{_quoted(f'{flag}:{option.help}')}" for option in options for flag in option.flags]


def fish(program):
    """Completion for fish.

    Args:
        program: words.Program.

    Returns:
        str
    """
    beginnings, rows, common = program.beginnings(), [], program.commands[0].common
    # What all commands take stands there once, unless it depends on the command where it may stand.
    is_shared = not any(REST in _kinds(command.arguments) for command in program.commands)
    for words, (options, arguments, following) in beginnings.items():
        command = " ".join(words)
        # Where all that follows an argument is another program's, options come before it.
        count = 0 if not words or REST in _kinds(arguments) else -1
        rows += [_fish_option(program, command, count, option) for option in options if not (words and is_shared and option in common)]
        rows += [f"{_fish_row(program, command, 'next')} -a {word} -d {_fish_quoted(text)}" for word, text in following]
        for at, kind in enumerate(_kinds(arguments)):
            if kind not in (OTHER, REST):
                rows.append(f"{_fish_row(program, command, at)} -a '({_function(program)}_values {kind})'")
    rows += [_fish_option(program, "*", -1, option) for option in common if is_shared]
    valued = [f"'{' '.join(words)} {flag}'" for words, (options, _, _) in beginnings.items() for flag in _valued(options)]
    commands = [f"'{' '.join(words)}'" for words in beginnings if words]
    sources = {**_FISH_VALUES, OWN: (f"printf '%s\\n' {' '.join(_own(program))}",)}
    values = _cases(program, sources, "        case {}", "            {}")
    return _filled(_FISH, "fish", program, TABLE=rows, VALUES=values, ALONE=[" ".join(program.alone)], COMMANDS=[" ".join(commands)], VALUED=[" ".join(valued)])


def _fish_option(program, command, count, option):
    flags = " ".join(f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}" for flag in option.flags)
    return f"{_fish_row(program, command, count)} {flags}{' -x' if option.value else ''} -d {_fish_quoted(option.help)}"


def _fish_row(program, command, count):
    return f"complete -c {program.name} -n '{_function(program)}_at \"{command}\" {count}'"


def _cases(program, sources, case, line, *end):
    """The cases of a shell's switch, for the kinds of arguments that a program has."""
    used = {argument.kind for command in program.commands for argument in command.arguments}
    rows = []
    for kind, lines in sources.items():
        if kind in used:
            rows += [case.format(kind), *(line.format(one) for one in lines), *end]
    return rows


def _own(program):
    return [word for word, _ in program.beginnings()[()][2]]


def _flags(options):
    return [flag for option in options for flag in option.flags]


def _valued(options):
    return [flag for option in options if option.value for flag in option.flags]


def _kinds(arguments):
    return [argument.kind for argument in arguments]


def _quoted(text):
    return "'" + text.replace("'", "'\\''") + "'"


def _fish_quoted(text):
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _function(program):
    return "_" + program.name.replace("-", "_")


def _filled(template, shell, program, **rows):
    text = _HEAD.format(name=program.name, shell=shell) + template
    for word, lines in {**rows, "FUNCTION": [_function(program)], "NAME": [program.name]}.items():
        text = text.replace(f"@{word}@", "\n".join(lines))
    return text
