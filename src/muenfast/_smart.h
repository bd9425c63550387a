/* S.M.A.R.T. data of a disk that is an ATA or an NVMe device, by ioctl; no Python.h.
 *
 * Constants: ATA/ATAPI-8 ACS (SMART READ DATA 0xb0/0xd0, SMART RETURN STATUS 0xb0/0xda, its answer in LBA mid and high),
 * SAT (ATA PASS-THROUGH(16), descriptor 0x09 of the sense data), NVMe base specification (log page 0x02).
 */
#ifndef MUENFAST_SMART_H
#define MUENFAST_SMART_H

#include <linux/nvme_ioctl.h>
#include <scsi/sg.h>
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>

#include "_wire.h"

_Static_assert(BLOCK_SIZE == 4096, "a header has redefined BLOCK_SIZE"); /* linux/fs.h would */

enum { SMART_TIMEOUT_MS = 5000 };

/* One ATA SMART command through SCSI; 0 where the device took it. registers: LBA mid and high afterwards, or NULL. */
static int smart_ata(int fd, uint8_t feature, uint8_t *data, size_t length, uint8_t registers[2]) {
    uint8_t command[16] = {0x85}; /* ATA PASS-THROUGH(16) */
    uint8_t sense[32] = {0};
    sg_io_hdr_t h;
    command[1] = length ? 4 << 1 : 3 << 1; /* PIO data-in, or no data */
    command[2] = length ? 0x0e : 0x20;     /* from the device, counted in blocks; or CK_COND: registers in the sense */
    command[4] = feature;
    command[6] = (uint8_t)(length / 512);
    command[10] = 0x4f;
    command[12] = 0xc2;
    command[14] = 0xb0; /* SMART */
    memset(&h, 0, sizeof h);
    h.interface_id = 'S';
    h.cmd_len = sizeof command;
    h.cmdp = command;
    h.mx_sb_len = sizeof sense;
    h.sbp = sense;
    h.dxfer_direction = length ? SG_DXFER_FROM_DEV : SG_DXFER_NONE;
    h.dxfer_len = (unsigned)length;
    h.dxferp = data;
    h.timeout = SMART_TIMEOUT_MS;
    if (ioctl(fd, SG_IO, &h) != 0 || h.host_status != 0 || (h.driver_status & ~0x08) != 0)
        return -1;
    if (registers == NULL)
        return h.status == 0 && h.resid == 0 ? 0 : -1;
    /* Descriptor format sense data whose first descriptor is the ATA status return. */
    if (h.sb_len_wr < 22 || (sense[0] & 0x7f) != 0x72 || sense[8] != 0x09)
        return -1;
    registers[0] = sense[8 + 9];
    registers[1] = sense[8 + 11];
    return 0;
}

/* Fills data (SMART_SIZE bytes) from the disk; SMART_OK, SMART_EXCEEDED, SMART_UNDEFINED or SMART_UNAVAILABLE. */
static uint64_t smart_read(int fd, uint8_t *data) {
    uint8_t registers[2];
    struct nvme_admin_cmd log;
    memset(data, 0, SMART_SIZE);
    memset(&log, 0, sizeof log);
    log.opcode = 0x02; /* Get Log Page */
    log.nsid = 0xffffffff;
    log.addr = (uint64_t)(uintptr_t)data;
    log.data_len = SMART_SIZE;
    log.cdw10 = 0x02 | (SMART_SIZE / 4 - 1) << 16; /* SMART / health, dwords - 1 */
    log.timeout_ms = SMART_TIMEOUT_MS;
    if (ioctl(fd, NVME_IOCTL_ADMIN_CMD, &log) == 0)
        return data[0] == 0 ? SMART_OK : SMART_EXCEEDED; /* critical warning */
    if (smart_ata(fd, 0xd0, data, SMART_SIZE, NULL) != 0)
        return SMART_UNAVAILABLE;
    if (smart_ata(fd, 0xda, NULL, 0, registers) != 0)
        return SMART_UNDEFINED;
    if (registers[0] == 0x4f && registers[1] == 0xc2)
        return SMART_OK;
    return registers[0] == 0xf4 && registers[1] == 0x2c ? SMART_EXCEEDED : SMART_UNDEFINED;
}

#endif
