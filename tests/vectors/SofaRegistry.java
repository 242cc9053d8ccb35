// SPDX-License-Identifier: Apache-2.0
// Frames as SOFARegistry's own classes write them, by name, as hex: what weir says must be the same bytes.
import com.alipay.remoting.ResponseStatus;
import com.alipay.remoting.rpc.HeartbeatCommand;
import com.alipay.remoting.rpc.protocol.RpcCommandEncoder;
import com.alipay.remoting.rpc.protocol.RpcRequestCommand;
import com.alipay.remoting.rpc.protocol.RpcResponseCommand;
import com.alipay.sofa.registry.common.model.client.pb.*;
import com.google.protobuf.GeneratedMessageV3;
import io.netty.buffer.ByteBuf;
import io.netty.buffer.Unpooled;
import java.io.Serializable;

public class SofaRegistry {
    static final byte PROTOBUF = 11;
    static final String DATA_ID = "com.a.Demo:1.0@DEFAULT";

    static void say(String name, Serializable command) throws Exception {
        ByteBuf out = Unpooled.buffer();
        new RpcCommandEncoder().encode(null, command, out);
        StringBuilder hex = new StringBuilder();
        while (out.isReadable()) {
            hex.append(String.format("%02x", out.readByte()));
        }
        System.out.println(name + " " + hex);
    }

    static RpcRequestCommand request(int id, int timeout, GeneratedMessageV3 message) {
        RpcRequestCommand command = new RpcRequestCommand();
        command.setId(id);
        command.setTimeout(timeout);
        command.setSerializer(PROTOBUF);
        command.setClazz(message.getClass().getName().getBytes());
        command.setContent(message.toByteArray());
        return command;
    }

    static RpcResponseCommand response(int id, GeneratedMessageV3 message) {
        RpcResponseCommand command = new RpcResponseCommand();
        command.setId(id);
        command.setSerializer(PROTOBUF);
        command.setResponseStatus(ResponseStatus.SUCCESS);
        command.setClazz(message.getClass().getName().getBytes());
        command.setContent(message.toByteArray());
        return command;
    }

    static BaseRegisterPb base(String owner, String app, long version) {
        String id = owner + "#" + DATA_ID;
        return BaseRegisterPb.newBuilder().setInstanceId("DEFAULT_INSTANCE_ID").setAppName(app)
            .setDataId(DATA_ID).setGroup("SOFA").setRegistId(id).setClientId(id)
            .setEventType("REGISTER").setVersion(version).setTimestamp(version).build();
    }

    static DataBoxPb box(String data) {
        return DataBoxPb.newBuilder().setData(data).build();
    }

    public static void main(String[] args) throws Exception {
        say("push", request(77, 2000, ReceivedDataPb.newBuilder()
            .setDataId(DATA_ID).setGroup("SOFA").setInstanceId("DEFAULT_INSTANCE_ID")
            .setSegment("DefaultDataCenter").setScope("global").addSubscriberRegistIds("r1")
            .putData("DEFAULT_ZONE", DataBoxesPb.newBuilder()
                .addData(box("10.0.0.7:12201?v=4.0&weight=30"))
                .addData(box("bolt://10.0.0.8:12201?v=4.0")).build())
            .setVersion(8169687452450816L).setLocalZone("DEFAULT_ZONE")
            .putPushDataCount("DefaultDataCenter", 2).build()));
        say("answer", response(1, RegisterResponsePb.newBuilder().setSuccess(true).setRegistId("r1")
            .setVersion(5).setMessage("PublisherRegister register success!").build()));
        say("publisher", request(1, 3000, PublisherRegisterPb.newBuilder()
            .addDataList(box("10.0.0.7:12201?v=4.0&app_name=demo"))
            .setBaseRegister(base("10.0.0.7:12201", "demo", 1001)).build()));
        say("subscriber", request(2, 3000, SubscriberRegisterPb.newBuilder().setScope("global")
            .setBaseRegister(base("weir-1", "weir", 1002)).build()));
        say("acknowledgement", response(77, ResultPb.newBuilder().setSuccess(true).build()));
        HeartbeatCommand heartbeat = new HeartbeatCommand();
        heartbeat.setId(3);
        heartbeat.setTimeout(3000);
        say("heartbeat", heartbeat);
    }
}
