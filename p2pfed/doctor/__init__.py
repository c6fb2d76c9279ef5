"""What is wrong on this machine, and the line that mends it: the room behind `p2pfed doctor`.

Map: `examine` gathers and asks every check in turn -> `own` (key, folder, sockets, users), `paths`
(listening, bootstrap peers, who reaches us), `agreed` (roster, run, versions), `machine` (clock,
disk, memory, GPU, service), `private` (data, ledger, task, trainer) -> `finding`, what a check
says; `scene` is what all of them start from, `seen` looks at files and users, `ways` and `ports` at
the network, `mending` does the few repairs that are safe, `redaction` is for the bug report.

Invariants. A check that judges is a function of gathered facts; what gathers changes nothing, waits
for nothing longer than its time limit, and works with and without a running daemon. Torch, a task
and a patient's file are only ever touched by another process. With `private` off nothing is asked
or read that belongs to the private plane, so that what is found may be sent to a stranger.

Not here: printing and asking (`cli.doctor`), the archive that goes with a report (`cli.bugreport`).
"""
