"""Many ranks: groups, collectives, sharded modules, dispatch of tokens, the pipeline, ZeRO-1, launch and watch."""
