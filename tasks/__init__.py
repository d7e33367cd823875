"""seqio tasks made from values: each module has a dataclass whose `build()` registers a task and returns its name.

Nothing of palmjax is imported here, and seqio only inside functions. A `content_key()` says which files a task reads,
so that changed files make another token store. Register tasks of your own the same way, or with
`seqio.TaskRegistry.add` in a module of yours that the configuration imports.
"""
