"""One peer: reliable messages over connections that may break. The only place where wire and
transport meet."""
