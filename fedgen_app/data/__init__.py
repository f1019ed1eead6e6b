"""What a client owns: its documents or images, how they are dealt out in simulation, and arrays worth keeping."""
