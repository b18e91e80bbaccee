"""Webhooks: an outbox of events, written in the events' own transactions, and its sender.

What changes a sandbox or template calls :mod:`orkestr_console.webhooks.outbox` in its transaction.
That adds one delivery for each webhook of the team that wants the event, and a task. A worker that
runs the task starts the process's sender (:mod:`orkestr_console.webhooks.sender`), which claims
deliveries, posts them and records the results. A delivery names its sender, who holds a lock of
that name (:mod:`orkestr_console.queue.driving`): what a killed worker was sending is sent again,
under the same delivery id.
"""
