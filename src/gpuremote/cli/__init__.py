"""The command line: ``gpuremote serve | devices | doctor | bench``."""
