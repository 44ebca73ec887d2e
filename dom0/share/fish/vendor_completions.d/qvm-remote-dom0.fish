# SPDX-License-Identifier: GPL-2.0-or-later
# Completion of qvm-remote-dom0 for fish. Made by tools/papers.py; do not edit.

# Says whether the command line so far is a command ($argv[1]; '*': any) and so many arguments ($argv[2]; -1: any number).
function _qvm_remote_dom0_at
    set -l alone --once --dry-run -h --help --version
    set -l commands 'authorize' 'revoke' 'rotate' 'keys' 'enable' 'disable' 'status' 'tail' 'history' 'explain' 'doctor'
    set -l valued ' --config-dir' 'tail -n' 'tail --lines' 'history --since' 'history --until' 'history --outcome' 'history -n' 'history --limit'
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

function _qvm_remote_dom0_values
    switch $argv[1]
        case vm
            qvm-ls --raw-list 2>/dev/null | string match -r -- '^[A-Za-z][A-Za-z0-9_.-]*$' | string match -v -- dom0
    end
end

complete -c qvm-remote-dom0 -f
complete -c qvm-remote-dom0 -n '_qvm_remote_dom0_at "" 0' -l once -d 'without the service: serve what waits in the queues of running qubes now, once'
complete -c qvm-remote-dom0 -n '_qvm_remote_dom0_at "" 0' -l dry-run -d 'with --once: say what would be run; nothing is taken, run or changed'
complete -c qvm-remote-dom0 -n '_qvm_remote_dom0_at "" 0' -l config-dir -x -d 'where the service\'s configuration lies (default: /etc/qubes/remote)'
complete -c qvm-remote-dom0 -n '_qvm_remote_dom0_at "" 0' -l version -d 'show the version'
complete -c qvm-remote-dom0 -n '_qvm_remote_dom0_at "" 0' -s h -l help -d 'show its help'
complete -c qvm-remote-dom0 -n '_qvm_remote_dom0_at "" next' -a authorize -d 'store a qube\'s key: dom0 knows it then, and runs for it what pillar lets it'
complete -c qvm-remote-dom0 -n '_qvm_remote_dom0_at "" next' -a revoke -d 'remove a qube\'s key: from then on all that it asks for is refused; what runs is not stopped'
complete -c qvm-remote-dom0 -n '_qvm_remote_dom0_at "" next' -a rotate -d 'give a qube a new key, without losing a command'
complete -c qvm-remote-dom0 -n '_qvm_remote_dom0_at "" next' -a keys -d 'list who has a key: fingerprints, what was last seen of it in the qube, what that qube may run'
complete -c qvm-remote-dom0 -n '_qvm_remote_dom0_at "" next' -a enable -d 'have the service run, now and from each boot on'
complete -c qvm-remote-dom0 -n '_qvm_remote_dom0_at "" next' -a disable -d 'stop the service, and have it come back at no boot'
complete -c qvm-remote-dom0 -n '_qvm_remote_dom0_at "" next' -a status -d 'show the qubes: session and its age, key, policy, counts, times, the last command'
complete -c qvm-remote-dom0 -n '_qvm_remote_dom0_at "" next' -a tail -d 'follow the audit log, until Ctrl-C'
complete -c qvm-remote-dom0 -n '_qvm_remote_dom0_at "" next' -a history -d 'list commands, one row for each'
complete -c qvm-remote-dom0 -n '_qvm_remote_dom0_at "" next' -a explain -d 'could a qube have a command run now, and by which rule of its policy (exit code 1 if not)'
complete -c qvm-remote-dom0 -n '_qvm_remote_dom0_at "" next' -a doctor -d 'examine the whole installation, and say what to type where something is wrong (exit code 1 then)'
complete -c qvm-remote-dom0 -n '_qvm_remote_dom0_at "authorize" -1' -l from-vm -d 'fetch the key from the qube, where \'qvm-remote key gen\' made it'
complete -c qvm-remote-dom0 -n '_qvm_remote_dom0_at "authorize" -1' -l in-advance -d 'there is no such qube yet: the key is for the first one that gets this name'
complete -c qvm-remote-dom0 -n '_qvm_remote_dom0_at "authorize" -1' -s h -l help -d 'show its help'
complete -c qvm-remote-dom0 -n '_qvm_remote_dom0_at "authorize" 0' -a '(_qvm_remote_dom0_values vm)'
complete -c qvm-remote-dom0 -n '_qvm_remote_dom0_at "revoke" -1' -s h -l help -d 'show its help'
complete -c qvm-remote-dom0 -n '_qvm_remote_dom0_at "revoke" 0' -a '(_qvm_remote_dom0_values vm)'
complete -c qvm-remote-dom0 -n '_qvm_remote_dom0_at "rotate" -1' -s h -l help -d 'show its help'
complete -c qvm-remote-dom0 -n '_qvm_remote_dom0_at "rotate" 0' -a '(_qvm_remote_dom0_values vm)'
complete -c qvm-remote-dom0 -n '_qvm_remote_dom0_at "keys" -1' -l json -d 'as JSON, for programs'
complete -c qvm-remote-dom0 -n '_qvm_remote_dom0_at "keys" -1' -s h -l help -d 'show its help'
complete -c qvm-remote-dom0 -n '_qvm_remote_dom0_at "keys" 0' -a '(_qvm_remote_dom0_values vm)'
complete -c qvm-remote-dom0 -n '_qvm_remote_dom0_at "enable" -1' -l accept-risk -d 'for scripts: do not ask'
complete -c qvm-remote-dom0 -n '_qvm_remote_dom0_at "enable" -1' -s h -l help -d 'show its help'
complete -c qvm-remote-dom0 -n '_qvm_remote_dom0_at "disable" -1' -s h -l help -d 'show its help'
complete -c qvm-remote-dom0 -n '_qvm_remote_dom0_at "status" -1' -l watch -d 'as a table on the terminal that is kept up to date, until Ctrl-C'
complete -c qvm-remote-dom0 -n '_qvm_remote_dom0_at "status" -1' -l json -d 'as JSON, for programs'
complete -c qvm-remote-dom0 -n '_qvm_remote_dom0_at "status" -1' -s h -l help -d 'show its help'
complete -c qvm-remote-dom0 -n '_qvm_remote_dom0_at "status" 0' -a '(_qvm_remote_dom0_values vm)'
complete -c qvm-remote-dom0 -n '_qvm_remote_dom0_at "tail" -1' -s n -l lines -x -d 'begin with so many old lines (default: 10)'
complete -c qvm-remote-dom0 -n '_qvm_remote_dom0_at "tail" -1' -l json -d 'as JSON, for programs'
complete -c qvm-remote-dom0 -n '_qvm_remote_dom0_at "tail" -1' -s h -l help -d 'show its help'
complete -c qvm-remote-dom0 -n '_qvm_remote_dom0_at "tail" 0' -a '(_qvm_remote_dom0_values vm)'
complete -c qvm-remote-dom0 -n '_qvm_remote_dom0_at "history" -1' -l since -x -d 'not older: 2026-11-24, 2026-11-24T18:00:00Z, or 15m, 2h, 7d for so long ago'
complete -c qvm-remote-dom0 -n '_qvm_remote_dom0_at "history" -1' -l until -x -d 'not younger; as for --since'
complete -c qvm-remote-dom0 -n '_qvm_remote_dom0_at "history" -1' -l outcome -x -d 'done, timeout, cancelled, interrupted, failed, refused, accepted, running, or an exit code'
complete -c qvm-remote-dom0 -n '_qvm_remote_dom0_at "history" -1' -s n -l limit -x -d 'at most so many, the newest ones (default: 20)'
complete -c qvm-remote-dom0 -n '_qvm_remote_dom0_at "history" -1' -l json -d 'as JSON, for programs'
complete -c qvm-remote-dom0 -n '_qvm_remote_dom0_at "history" -1' -s h -l help -d 'show its help'
complete -c qvm-remote-dom0 -n '_qvm_remote_dom0_at "history" 0' -a '(_qvm_remote_dom0_values vm)'
complete -c qvm-remote-dom0 -n '_qvm_remote_dom0_at "explain" 0' -l exec -d 'the words are exactly the arguments, as with qvm-remote --exec'
complete -c qvm-remote-dom0 -n '_qvm_remote_dom0_at "explain" 0' -l json -d 'as JSON, for programs'
complete -c qvm-remote-dom0 -n '_qvm_remote_dom0_at "explain" 0' -s h -l help -d 'show its help'
complete -c qvm-remote-dom0 -n '_qvm_remote_dom0_at "explain" 0' -a '(_qvm_remote_dom0_values vm)'
complete -c qvm-remote-dom0 -n '_qvm_remote_dom0_at "doctor" -1' -l json -d 'as JSON, for programs'
complete -c qvm-remote-dom0 -n '_qvm_remote_dom0_at "doctor" -1' -s h -l help -d 'show its help'
