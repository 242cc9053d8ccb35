# SPDX-License-Identifier: Apache-2.0
"""Does a connection over loopback behave as without a sockmap? One line for each look at it.

Run by scripts/shortcut, which says how its sockets are treated. Usage: shortcut.py PORT
"""
import array
import errno
import fcntl
import os
import signal
import socket
import struct
import sys
import termios
import threading
import time

PORT = int(sys.argv[1])
MEGABYTE = 1 << 20
MSG_ZEROCOPY, SO_ZEROCOPY = 0x4000000, 60


def pair():
    """The application's socket, and the one that weir would have accepted."""
    with socket.create_server(("127.0.0.1", PORT)) as listener:
        application = socket.create_connection(("127.0.0.1", PORT))
        return application, listener.accept()[0]


def until(true):
    deadline = time.monotonic() + 5
    while not true() and time.monotonic() < deadline:
        time.sleep(0.002)


def state(pid):
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]


def name(error):
    return errno.errorcode.get(error.errno, str(error))



def received(sock):
    """What comes until nothing more does."""
    sock.settimeout(0.2)
    whole = b""
    try:
        while piece := sock.recv(MEGABYTE):
            whole += piece
    except TimeoutError:
        pass
    return whole


def receive_disturbed(disturb):
    application, weir = pair()
    ours, theirs = os.pipe()
    signal.signal(signal.SIGUSR1, lambda *_: None)
    signal.siginterrupt(signal.SIGUSR1, False)  # SA_RESTART
    child = os.fork()
    if child == 0:
        try:
            answer = application.recv(16).decode()
        except OSError as error:
            answer = name(error)
        os.write(theirs, answer.encode())
        os._exit(0)
    until(lambda: state(child) == "S")
    disturb(child)
    time.sleep(0.1)
    weir.sendall(b"received")
    answer = os.read(ours, 64).decode()
    os.waitpid(child, 0)
    return answer


def stop_and_continue(child):
    os.kill(child, signal.SIGSTOP)
    until(lambda: state(child) == "T")
    os.kill(child, signal.SIGCONT)


def receive_while_sending():
    application, weir = pair()
    answer = []

    def receive():
        try:
            answer.append(application.recv(16).decode())
        except OSError as error:
            answer.append(name(error))

    receiver = threading.Thread(target=receive)
    receiver.start()
    sender = threading.Thread(target=lambda: application.sendall(bytes(32 * MEGABYTE)))
    sender.start()
    time.sleep(0.2)  # the send buffer is full, and will be writable again
    left = 32 * MEGABYTE
    while left:
        left -= len(weir.recv(MEGABYTE))
    sender.join()
    weir.sendall(b"received")
    receiver.join()
    return answer[0]


def count_waiting():
    application, weir = pair()
    weir.sendall(bytes(100))
    until(lambda: len(application.recv(100, socket.MSG_PEEK)) == 100)
    count = array.array("i", [0])
    fcntl.ioctl(application, termios.FIONREAD, count)
    return f"{count[0]} of 100"


def splice_waiting():
    application, weir = pair()
    application.sendall(bytes(100))
    until(lambda: len(weir.recv(100, socket.MSG_PEEK)) == 100)
    _, into = os.pipe()
    weir.setblocking(False)
    try:
        return f"{os.splice(weir.fileno(), into, 100, flags=os.SPLICE_F_NONBLOCK)} of 100"
    except OSError as error:
        return name(error)


def zero_copy():
    application, weir = pair()
    application.setsockopt(socket.SOL_SOCKET, SO_ZEROCOPY, 1)
    for _ in range(10):
        application.send(bytes(65536), MSG_ZEROCOPY)
        received(weir)
    done = 0
    for _ in range(10):
        try:
            _, notes, _, _ = application.recvmsg(1, 512, socket.MSG_ERRQUEUE | socket.MSG_DONTWAIT)
        except BlockingIOError:
            time.sleep(0.01)
            continue
        for _, _, note in notes:
            first, last = struct.unpack("=II", note[8:16])
            done += last - first + 1
    return f"{done} of 10"


def urgent():
    application, weir = pair()
    application.send(b"abc")
    application.send(b"D", socket.MSG_OOB)
    application.send(b"ef")
    time.sleep(0.1)
    return f"in-band {received(weir).decode()}"


def half_close():
    application, weir = pair()
    application.sendall(bytes(100_000))
    application.shutdown(socket.SHUT_WR)
    time.sleep(0.05)
    whole = len(received(weir))
    weir.sendall(b"answer")
    return f"{whole} bytes, FIN, {received(application).decode()}"


def reset():
    application, weir = pair()
    application.sendall(bytes(10_000))
    application.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("=ii", 1, 0))
    application.close()
    time.sleep(0.05)
    whole = 0
    try:
        while piece := weir.recv(4096):
            whole += len(piece)
        return f"{whole} bytes, FIN"
    except OSError as error:
        return f"{whole} bytes, {name(error)}"


def order():
    application, weir = pair()
    sent = b"".join(struct.pack("=I", word) for word in range(200))
    for at in range(0, len(sent), 4):
        application.send(sent[at : at + 4])
    time.sleep(0.1)
    return "kept" if received(weir) == sent else "lost"


def stalled_reader():
    application, _weir = pair()
    application.settimeout(0.5)
    taken = 0
    try:
        while taken < 128 * MEGABYTE:
            taken += application.send(bytes(65536))
    except TimeoutError:
        pass
    return "a full buffer stops it" if taken < 16 * MEGABYTE else "nothing stops it (128 MB)"


LOOKS = {
    "blocking recv, the process stopped and continued": lambda: receive_disturbed(stop_and_continue),
    "blocking recv, a signal with SA_RESTART": lambda: receive_disturbed(
        lambda child: os.kill(child, signal.SIGUSR1)
    ),
    "blocking recv while another thread sends bulk": receive_while_sending,
    "FIONREAD, bytes that wait": count_waiting,
    "MSG_ZEROCOPY, completions": zero_copy,
    "splice from the other end, bytes that wait": splice_waiting,
    "MSG_OOB, abc D ef": urgent,
    "half-close": half_close,
    "SO_LINGER 0, with bytes unread": reset,
    "order of 200 messages, read late": order,
    "a reader that has stalled": stalled_reader,
}
for what, look in LOOKS.items():
    print(f"{what}\t{look()}", flush=True)
