"""The planner against measurements that others published."""
