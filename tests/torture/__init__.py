"""Trials of what `docs/reliability.md` promises, by force: kills, full disks, damaged files, bad numbers, many at once.

``make torture`` runs all of it. Each kind of trial is a module with ``run(report, share)`` and writes a file
``torture-KIND.json`` with what was tried, what became of it, and what to call to see a failure again.
"""
