"""Programs that tests start in processes of their own, with `support.project.environment()`."""
