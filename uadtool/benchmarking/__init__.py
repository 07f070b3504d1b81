"""Speed, memory and energy of exported detectors on this machine."""
