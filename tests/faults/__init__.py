"""The kill matrix: every process of an installation struck at every moment, and what came of it.

``python -m tests.faults`` (`make faults`) runs it; :mod:`tests.clients.test_faults` a few cells.

``installation``  a whole installation with a neighbour, things to be kept, and who restarts `up`
``processes``     what can be struck, where it is found, and what may break with it
``moments``       what the installation is brought to be doing, by looking, before it is struck
``calls``         what clients ask meanwhile, and whether the answers are such as were promised
``truth``         what rows say beside what the host has; what is on the host, by whose it is
``cell``          one process at one moment: reach, strike, wait, check, tidy
``table``         the results as Markdown
"""
