"""Host memory: what programs pass in, as flat bytes, without copies where there is a way."""
