"""The part of ``gpuremote.torch`` that is in C++: its sources, and how they are built."""
