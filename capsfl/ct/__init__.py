"""CT: scans from DICOM and NIfTI to one standard volume, and predictions back to the scan."""
