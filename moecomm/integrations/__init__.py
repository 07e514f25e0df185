"""moecomm in other projects: each module needs that project, and is imported by its own name."""
