"""`hicache-io bench serve`: real SGLang servers, one for each way of write-back, loaded in turns.

`models` makes what they serve, `arms` says how each is started, `workloads` what is asked, `load` asks it,
`scrape` reads the servers' own metrics, `account` counts, `run` starts all and gives each its turn, `tables`,
`plots` and `report` show what came out, `public` drives SGLang's own benchmark.
"""
