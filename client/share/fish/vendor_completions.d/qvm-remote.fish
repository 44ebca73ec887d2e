# SPDX-License-Identifier: GPL-2.0-or-later
# Completion of qvm-remote for fish. Made by tools/papers.py; do not edit.

# Says whether the command line so far is a command ($argv[1]; '*': any) and so many arguments ($argv[2]; -1: any number).
function _qvm_remote_at
    set -l alone -s --exec -h --help --version
    set -l commands 'key' 'queue' 'key gen' 'key show' 'key import' 'key fingerprint' 'ping' 'status' 'queue status' 'queue clean' 'queue debug' 'queue make' 'queue check' 'log' 'history' 'history show' 'cancel' 'help'
    set -l valued ' -t' ' --timeout' 'ping -t' 'ping --timeout' 'log -n' 'history -n'
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

function _qvm_remote_values
    switch $argv[1]
        case kept
            set -l names ~/.qvm-remote/history/*/*
            printf '%s\n' $names | string replace -r '.*/' '' | string match -r -- '^[0-9]{8}-[0-9]{6}-[0-9]{1,10}-[0-9a-f]{8}$'
        case waiting
            set -l names ~/.qvm-remote/queue/{pending,running}/*
            printf '%s\n' $names | string replace -r '.*/' '' | string match -r -- '^[0-9]{8}-[0-9]{6}-[0-9]{1,10}-[0-9a-f]{8}$'
        case own
            printf '%s\n' key queue ping status log history cancel help
    end
end

complete -c qvm-remote -f
complete -c qvm-remote -n '_qvm_remote_at "" 0' -s t -l timeout -x -d 'let it run SEC seconds (default 300, or dom0\'s limit for this qube)'
complete -c qvm-remote -n '_qvm_remote_at "" 0' -s n -d 'send no stdin'
complete -c qvm-remote -n '_qvm_remote_at "" 0' -s s -d 'read the script from stdin, ARGs are its $1, $2...'
complete -c qvm-remote -n '_qvm_remote_at "" 0' -l exec -d 'pass the argument vector as it is'
complete -c qvm-remote -n '_qvm_remote_at "" 0' -s q -l quiet -d 'no notes of qvm-remote\'s own on stderr, errors only'
complete -c qvm-remote -n '_qvm_remote_at "" 0' -s v -l verbose -d 'say on stderr what happens, with times'
complete -c qvm-remote -n '_qvm_remote_at "" 0' -l version -d 'print the version'
complete -c qvm-remote -n '_qvm_remote_at "" 0' -s h -l help -d 'print this text; after a command, its own'
complete -c qvm-remote -n '_qvm_remote_at "" next' -a key -d 'gen, show, import, fingerprint'
complete -c qvm-remote -n '_qvm_remote_at "" next' -a queue -d 'status, clean, debug, make, check'
complete -c qvm-remote -n '_qvm_remote_at "" next' -a ping -d 'measure the way to dom0 and back; compare keys, versions and clocks'
complete -c qvm-remote -n '_qvm_remote_at "" next' -a status -d 'is there a key, a session to dom0, something waiting'
complete -c qvm-remote -n '_qvm_remote_at "" next' -a log -d 'the last N lines of the log: one for what was asked for, and one for how it ended'
complete -c qvm-remote -n '_qvm_remote_at "" next' -a history -d 'the last N commands, the newest first, and how they ended'
complete -c qvm-remote -n '_qvm_remote_at "" next' -a cancel -d 'have dom0 kill a command of this qube'
complete -c qvm-remote -n '_qvm_remote_at "" next' -a help -d 'print help, of a command if one is named'
complete -c qvm-remote -n '_qvm_remote_at "key" next' -a gen -d 'make a new key for this qube'
complete -c qvm-remote -n '_qvm_remote_at "key" next' -a show -d 'print the key itself'
complete -c qvm-remote -n '_qvm_remote_at "key" next' -a import -d 'read a key (64 hex digits) from stdin'
complete -c qvm-remote -n '_qvm_remote_at "key" next' -a fingerprint -d 'print the name of this qube and its key\'s fingerprint, which gives nothing away'
complete -c qvm-remote -n '_qvm_remote_at "queue" next' -a status -d 'what waits and runs, and whether its client still does'
complete -c qvm-remote -n '_qvm_remote_at "queue" next' -a clean -d 'put away what clients left that are gone'
complete -c qvm-remote -n '_qvm_remote_at "queue" next' -a debug -d 'everything that lies in the queue, for a report of a problem'
complete -c qvm-remote -n '_qvm_remote_at "queue" next' -a make -d 'put this user\'s queue in order'
complete -c qvm-remote -n '_qvm_remote_at "queue" next' -a check -d 'say what is wrong with this user\'s queue; exits with 1 if something is'
complete -c qvm-remote -n '_qvm_remote_at "key gen" -1' -l force -d 'replace the key that is there; dom0 then has to authorize the new one'
complete -c qvm-remote -n '_qvm_remote_at "key show" -1' -l secret -d 'don\'t ask: print it, into a pipe as well'
complete -c qvm-remote -n '_qvm_remote_at "key import" -1' -l force -d 'replace the key that is there; dom0 then has to authorize the new one'
complete -c qvm-remote -n '_qvm_remote_at "ping" -1' -s t -l timeout -x -d 'wait SEC seconds (default 10)'
complete -c qvm-remote -n '_qvm_remote_at "ping" -1' -l json -d 'print JSON'
complete -c qvm-remote -n '_qvm_remote_at "status" -1' -l json -d 'print JSON'
complete -c qvm-remote -n '_qvm_remote_at "queue status" -1' -l json -d 'print JSON'
complete -c qvm-remote -n '_qvm_remote_at "log" -1' -s n -x -d 'the same as N'
complete -c qvm-remote -n '_qvm_remote_at "history" -1' -s n -x -d 'the same as N'
complete -c qvm-remote -n '_qvm_remote_at "history" -1' -l json -d 'print JSON'
complete -c qvm-remote -n '_qvm_remote_at "history" next' -a show -d 'a command, its output, and whether dom0\'s proof fits it'
complete -c qvm-remote -n '_qvm_remote_at "history show" -1' -l command -d 'only the command'
complete -c qvm-remote -n '_qvm_remote_at "history show" -1' -l out -d 'only what it wrote to stdout'
complete -c qvm-remote -n '_qvm_remote_at "history show" -1' -l err -d 'only what it wrote to stderr'
complete -c qvm-remote -n '_qvm_remote_at "history show" -1' -l json -d 'print JSON'
complete -c qvm-remote -n '_qvm_remote_at "history show" 0' -a '(_qvm_remote_values kept)'
complete -c qvm-remote -n '_qvm_remote_at "cancel" 0' -a '(_qvm_remote_values waiting)'
complete -c qvm-remote -n '_qvm_remote_at "help" 0' -a '(_qvm_remote_values own)'
complete -c qvm-remote -n '_qvm_remote_at "*" -1' -s q -l quiet -d 'no notes of qvm-remote\'s own on stderr, errors only'
complete -c qvm-remote -n '_qvm_remote_at "*" -1' -s v -l verbose -d 'say on stderr what happens, with times'
complete -c qvm-remote -n '_qvm_remote_at "*" -1' -s h -l help -d 'print this text; after a command, its own'
