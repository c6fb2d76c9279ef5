"""The daemon: performs the core's effects, keeps the store, supervises the trainer.

daemon.py       composition root: lock, sockets, signals, one nursery
shell.py        events in, effects out; no policy
store.py        deltas, proofs, events and small facts in SQLite
checkpoints.py  model states as safetensors files
model.py        the fold in a worker thread
trainer.py      parent end of the trainer process
view.py         what the admin socket shows and does
directory.py    the data directory: its lock, rosters and run files
"""
