"""What a machine is and what runs on it uses: facts, samplers, exposition, diagnosis.

Nothing here decides or enforces. Import from the modules: `machine` (facts and capacity), `cgroups` (where they lie),
`sample` (one reading), `watch` (many readings), `exposition` (Prometheus text), `doctor` (what is missing here).
"""
