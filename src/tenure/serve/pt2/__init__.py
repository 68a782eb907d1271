"""What serving torch's exported programs (.pt2) takes beside the engine: `check` before loading, `graphs` on a device."""
