"""The product on whole stock Debian machines, each in an emulator: `make test-vm`.

Not part of `make test`: by emulation a release takes half an hour.  :mod:`tests.vm.__main__` says
how to run it, :mod:`tests.vm.releases` on what.
"""
