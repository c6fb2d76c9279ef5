"""`p2pfed demo`: five real daemons on this machine, and what their network is worth.

plan.py        who takes part, on what data, with which constants
federation.py  keys, rosters, run, configurations; starts and stops the daemons
story.py       what happens on the way: a kill, a late joiner, a leaver
compare.py     the models against training alone and pooled, in a process of its own
screen.py      the live table, or plain lines
simulated.py   not part of the demo: many hospitals that really train in one process, no daemons
"""
