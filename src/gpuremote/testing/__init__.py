"""For tests of gpuremote and of what extends it: a suite that every transport has to pass, and a
network that breaks on purpose. Nothing here is imported by the library itself."""
