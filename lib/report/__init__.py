"""The report: runs read back, statistics, tables, figures and sentences."""
