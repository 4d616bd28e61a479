"""The data sets that come with the project: one YAML file each. `online_retail.yaml` is the manual."""
