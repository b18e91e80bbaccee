"""The machine underneath: its files, kernel, processes and clocks.  Knows no container."""
