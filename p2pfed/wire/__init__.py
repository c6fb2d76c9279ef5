"""What goes over the wire, byte for byte: payloads, deltas, messages; limits before decoding."""
