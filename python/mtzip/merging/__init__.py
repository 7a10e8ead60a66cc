"""One sweep over the graphs: moments, matching, closed-form merges, and their installation."""
