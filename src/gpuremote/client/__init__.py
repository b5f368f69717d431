"""The client: sessions, devices, arrays; one core that never blocks and two drivers for it."""
