"""The private plane: patients and raw updates live here, and only the gate's output leaves.

`task` is what a hospital's engineer writes, `vector` the flat form of a model, `contributions` one
clipped-to-be vector per patient, `local` ordinary training, `round` one round from view to release,
`process` and `private_socket` the trainer process and its own private, read-only socket.
"""
